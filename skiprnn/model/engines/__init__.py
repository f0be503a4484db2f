"""How the time loop is executed. An engine never changes what is computed; the reference engine defines it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import compact, native, reference, triton
from skiprnn.model.policies import Policy

ENGINES: dict[str, Callable] = {
    "reference": reference.run,
    "compact": compact.run,
    "native": native.run,
    "triton": triton.run,
}


def check(name: str) -> None:
    """Raises ValueError unless `name` is an engine or "auto"."""
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are auto, {', '.join(ENGINES)}")


def choose(name: str, cells: Sequence[Cell], policy: Policy, x: Tensor) -> str:
    """The engine that `name` stands for: itself, or for "auto" the fastest that serves these cells, policy and input.

    Raises:
        ValueError: unknown name, or an engine that does not serve.
    """
    check(name)
    for engine, module in (("native", native), ("triton", triton), ("compact", compact)):
        interpreted = engine == "triton" and x.device.type == "cpu"  # slow: only where it is asked for
        if name == engine or (name == "auto" and not interpreted):
            reason = module.unsupported(cells, policy, x)
            if reason is None:
                return engine
            if name == engine:
                raise ValueError(f"the {name} engine can't run this: {reason}")
    return "reference"


def run_packed(name: str, runs: Sequence[tuple]) -> list[tuple]:
    """The results of one engine on several networks of one architecture, each with its own weights and batch.

    Args:
        name: an engine.
        runs: the arguments of each one's run; equal shapes share a launch on a GPU.
    """
    if name == "triton" and len({x.shape for _, _, x, *_ in runs}) == 1:
        return triton.run_packed(runs)
    return [ENGINES[name](*run) for run in runs]

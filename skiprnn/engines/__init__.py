"""How the time loop is executed. An engine never changes what is computed; the reference engine defines it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from skiprnn.cells import Cell
from skiprnn.engines import compact, native, reference
from skiprnn.policies import Policy

ENGINES: dict[str, Callable] = {"reference": reference.run, "compact": compact.run, "native": native.run}


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
    for engine, unsupported in (("native", native.unsupported), ("compact", compact.unsupported)):
        if name in ("auto", engine):
            reason = unsupported(cells, policy, x)
            if reason is None:
                return engine
            if name == engine:
                raise ValueError(f"the {name} engine can't run this: {reason}")
    return "reference"

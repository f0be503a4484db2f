"""How the time loop is executed. An engine never changes what is computed; the reference engine defines it.

"auto" takes the first that serves: on a CPU native (C++), then compact (torch, of the rows that update; no learned
decision in training); on a GPU cuda (CUDA C++, weights in registers), then triton, then batched (torch, step by step),
of those that contact finds right there; reference otherwise, as for what a user adds.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import batched, compact, contact, cuda, native, reference, triton
from skiprnn.model.engines.call import Call, Result, unknown
from skiprnn.model.policies import Policy, Skip


class Engine(Protocol):
    """What every engine's module has."""

    def unsupported(self, cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
        """Why the engine does not serve these on an input like x; None if it does."""

    def run(self, call: Call) -> Result:
        """Run whole sequences."""


ENGINES: dict[str, Engine] = {
    "reference": reference,
    "compact": compact,
    "native": native,
    "batched": batched,
    "triton": triton,
    "cuda": cuda,
}
SHARED = {"batched": batched, "triton": triton, "cuda": cuda}  # several runs in one launch


def check(name: str) -> None:
    """Raises ValueError unless `name` is an engine or "auto"."""
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are auto, {', '.join(ENGINES)}")


def choose(name: str, cells: Sequence[Cell], policy: Policy, x: Tensor, dropout: bool = False) -> str:
    """The engine that `name` stands for: itself, or for "auto" the fastest that serves these cells, policy and input.

    Args:
        name: an engine, or "auto".
        cells: the layers.
        policy: theirs.
        x: (B, T, I).
        dropout: whether the call has masks.

    Raises:
        ValueError: unknown name, or an engine that does not serve.
    """
    check(name)
    tied = "it has no dropout between layers that share a gate" if dropout and isinstance(policy, Skip) else None
    if name != "auto":
        reason = ENGINES[name].unsupported(cells, policy, x)
        if name != "reference":
            reason = reason or tied
        if reason is not None:
            raise ValueError(f"the {name} engine can't run this: {reason}")
        return name
    reason = unknown(cells, policy) or tied
    if reason is not None:
        _say_once(f"skiprnn's reference engine runs this, correctly but slowly; of the fast ones, {reason}")
        return "reference"
    # Triton's interpreter is slow: only where it is asked for
    fast = ("native", "compact") if x.device.type == "cpu" else ("cuda", "triton", "batched")
    named = x.device.type, cells[0].name, policy.name, len(cells)
    for engine in fast:
        if ENGINES[engine].unsupported(cells, policy, x) is None and _trusted(engine, *named):
            return engine
    return "reference"


def _trusted(engine: str, device: str, cell: str, policy: str, layers: int) -> bool:
    """Whether an engine gives right results here; says so once if it does not. Of CPUs the tests know."""
    reason = None if device == "cpu" else contact.refused(engine, device, cell, policy, layers)
    if reason is not None:
        _say_once(f"skiprnn's {engine} engine is not used on {device} for {cell} and {policy}: {reason}")
    return reason is None


_trusted._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as native.build.available


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def run_packed(name: str, calls: Sequence[Call]) -> list[Result]:
    """The results of one engine on several networks of one architecture, each with its own weights and batch.

    Args:
        name: an engine.
        calls: one per network; equal shapes share a launch on a GPU.
    """
    if name in SHARED and len({call.x.shape for call in calls}) == 1:
        return SHARED[name].run_packed(calls)
    return [ENGINES[name].run(call) for call in calls]

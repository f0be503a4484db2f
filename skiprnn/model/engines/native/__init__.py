"""The native engine: the recurrence in C++ on the CPU, at a cost that falls with the state updates, exactly.

LSTM and GRU under every policy of the papers, float32 and float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines.call import Call, Result, unknown
from skiprnn.model.engines.native import build, operator  # noqa: F401  (registers the kernels)
from skiprnn.model.engines.operator import apply, needs_gradient
from skiprnn.model.engines.problems import by_layers, problem_of, result_of
from skiprnn.model.policies import Policy


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if x.device.type != "cpu":
        return f"it runs on the CPU; x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64; x is {x.dtype}"
    reason = unknown(cells, policy)
    if reason is not None:
        return reason
    if not build.available():
        return "it is not compiled"
    return None


def run(call: Call) -> Result:
    """As reference.run."""
    return by_layers([call], _run_stack)[0]


def _run_stack(calls: Sequence[Call], layer: int) -> list[Result]:
    """The operator on one call."""
    (call,) = calls
    problem = problem_of("native", call, layer)
    save = needs_gradient(problem)
    if call.alike and not (save and call.x.requires_grad):  # a gradient of x is each sequence's own
        problem = problem._replace(states=[h[:1] for h in problem.states], gate=[part[:1] for part in problem.gate])
    return [result_of(call, problem, apply(problem, save))]

"""The batched engine: plain torch operations step by step, of all runs that share a launch at once; backward by hand.

LSTM and GRU under every policy of the papers. It runs on any device, and has no shape or branch that depends on data,
so that a CUDA graph can record it. A step is some thirty operations.
"""

from collections.abc import Sequence

from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import runs
from skiprnn.model.engines.batched import operator  # noqa: F401  (registers the kernels)
from skiprnn.model.engines.call import Call, Result, unknown
from skiprnn.model.policies import Policy


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    return unknown(cells, policy)


def run(call: Call) -> Result:
    """As reference.run."""
    return run_packed([call])[0]


def run_packed(calls: Sequence[Call]) -> list[Result]:
    """Several networks of one cell, policy and size on batches of one shape, at once."""
    return runs.run_packed("batched", calls)

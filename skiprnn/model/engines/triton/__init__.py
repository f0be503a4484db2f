"""The GPU engine: the whole time loop in one kernel per pass, written in Triton; several runs may share a launch.

LSTM and GRU under every policy of the papers, float32, up to 512 units. The recurrent products have tf32's precision,
or float32's where torch.backends.cudnn.rnn.fp32_precision is "ieee", as torch.nn.LSTM's have.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import runs
from skiprnn.model.engines.call import Call, Result, unknown
from skiprnn.model.engines.triton.launch import TILE, operands, padded, wasteful
from skiprnn.model.policies import Policy, Skip

LARGEST = 512  # units: beyond that a tile of rows leaves the chip too often


@cache
def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1): slow, for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if x.device.type != "cuda" and not interpreted():
        return f"it runs on a GPU; x is on {x.device}"
    if x.dtype != torch.float32 and not interpreted():
        return f"it computes in float32; x is {x.dtype}"
    reason = unknown(cells, policy)
    if reason is not None:
        return reason
    widest = max(cell.hidden_size for cell in cells)
    if widest > LARGEST:
        return f"it serves up to {LARGEST} units; there are {widest}"
    if x.device.type == "cuda":
        layers = len(cells) if isinstance(policy, Skip) else 1  # that are run at once
        programs, processors = -(-len(x) // TILE), torch.cuda.get_device_properties(x.device).multi_processor_count
        if wasteful(len(cells[0].gates), layers, padded(widest), operands(x.dtype), programs, processors):
            return f"for {widest} units it is slow where it uses {programs} of the GPU's {processors} processors"
    return None


def run(call: Call) -> Result:
    """As reference.run."""
    return run_packed([call])[0]


def run_packed(calls: Sequence[Call]) -> list[Result]:
    """Several networks of one cell, policy and size on batches of one shape, in one launch."""
    import skiprnn.model.engines.triton.operator  # noqa: F401  (registers the kernels; here, for not everybody has Triton)

    return runs.run_packed("triton", calls)

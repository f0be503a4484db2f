"""The engine for NVIDIA's GPUs: the whole time loop in one CUDA kernel per pass, its weights in registers.

LSTM and GRU under every policy of the papers (Skip in one layer, Selective of few inputs), float32, H + I + 1 <= 128.
Recurrent products are of fp16 operands, which have tf32's mantissa, those of the weights' gradients of bfloat16; all
are summed in float32. Where torch.backends.cudnn.rnn.fp32_precision is "ieee" it does not serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import runs
from skiprnn.model.engines.call import Call, Result, unknown
from skiprnn.model.engines.cuda import nvrtc
from skiprnn.model.engines.cuda.operator import LARGEST
from skiprnn.model.policies import Policy, Selective, Skip

FEW_INPUTS = 4  # that fit the registers beside the weights
CAPABILITY = (8, 0)  # of the tensor cores' instructions that the kernels use


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if reason := unknown(cells, policy) or unfit(cells, policy):
        return reason
    if x.device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA's GPUs; x is on {x.device}"
    if x.dtype != torch.float32:
        return f"it computes in float32; x is {x.dtype}"
    if torch.backends.cudnn.rnn.fp32_precision == "ieee":  # type: ignore[attr-defined]
        return "it has tf32's precision; torch.backends.cudnn.rnn.fp32_precision is 'ieee'"
    if reason := nvrtc.missing():
        return reason
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    return None


def unfit(cells: Sequence[Cell], policy: Policy) -> str | None:
    """Why these are not what the kernels compute; None if they are."""
    if isinstance(policy, Skip) and len(cells) > 1:
        return "it has no layers that share a gate"
    if isinstance(policy, Selective) and (most := max(cell.input_size for cell in cells)) > FEW_INPUTS:
        return f"its coordinators read up to {FEW_INPUTS} inputs; there are {most}"
    widest = max(cell.hidden_size + cell.input_size + 1 for cell in cells)
    return f"a step reads {widest} numbers, of h, x and 1; it serves {LARGEST}" if widest > LARGEST else None


def run(call: Call) -> Result:
    """As reference.run."""
    return run_packed([call])[0]


def run_packed(calls: Sequence[Call]) -> list[Result]:
    """Several networks of one cell, policy and size on batches of one shape, in one launch."""
    return runs.run_packed("cuda", calls)

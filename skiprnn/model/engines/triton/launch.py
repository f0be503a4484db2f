"""How a call is laid out on a GPU: tiles, blocks, which kernels. Without Triton, so that it can be asked anywhere."""

import torch

TILE = 16  # sequences of a program: the least that a matrix instruction takes
BLOCK_BYTES = 128  # of a row of a weight, where weights are streamed: so many columns are computed at once
ON_CHIP = 128 << 10  # bytes of weights that a program keeps on the chip
FEW_INPUTS = 2  # so many are multiplied within the time loop; more, in one product before it
MANY_PRODUCTS = 200  # of blocks, one after another in a step of a program: at 0.25 us each (modelled) torch is faster


def operands(dtype: torch.dtype) -> torch.dtype:
    """What the recurrent products multiply, by the setting that torch.nn.LSTM obeys.

    fp16 has tf32's mantissa, states and weights fit its range, gradients are scaled into it.
    """
    tf32 = dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "ieee"  # type: ignore[attr-defined]
    return torch.float16 if tf32 else dtype


def padded(size: int) -> int:
    """W, the columns of a state of `size` units: whole tiles."""
    return -(-size // TILE) * TILE


def fits_chip(gates: int, layers: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a program can hold all weights, of gates * layers matrices (W, W) of type `dtype`, a block each."""
    return layers == 1 and gates * _power_of_2(width) ** 2 * dtype.itemsize <= ON_CHIP


def columns(width: int, dtype: torch.dtype, resident: bool) -> int:
    """BLOCK: the columns that are computed at once."""
    return _power_of_2(width) if resident else min(_power_of_2(width), BLOCK_BYTES // dtype.itemsize)


def wasteful(gates: int, layers: int, width: int, dtype: torch.dtype, programs: int, processors: int) -> bool:
    """Whether a launch would leave the GPU idle for longer than batched torch operations take.

    That is where the weights are streamed, a step of one program is many products of blocks one after another, and
    there are fewer programs than a quarter of the GPU's `processors`.
    """
    if fits_chip(gates, layers, width, dtype):
        return False
    blocks = -(-width // columns(width, dtype, resident=False))
    return gates * (2 * layers - 1) * blocks**2 > MANY_PRODUCTS and programs < processors / 4


def _power_of_2(size: int) -> int:
    """The least power of 2 that is no smaller."""
    return 1 << (size - 1).bit_length()

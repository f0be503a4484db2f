"""What the kernels are made of: sequences, blocks of memory, products, and a step of one block of columns.

Shapes: R runs, B batch, T steps, I input, H hidden of the top layer, L layers, G gates (LSTM i j f o, GRU r z
candidate), X = G and Selective's gate, W = H of the widest layer padded to 16; what is beyond a layer's H stays 0.
A program has TILE sequences and computes BLOCK columns at once.

col: columns of a matrix of all sequences, or of a weight; k: rows of a weight. a: pre-activations, a tuple of (TILE,
BLOCK); h, c: a state; D_h, D_c: gradients of a state.
"""
# mypy: disable-error-code="assignment, misc"

from typing import NamedTuple

import triton
import triton.language as tl

from skiprnn.model.engines.triton.cells import gru, gru_backward, lstm, lstm_backward, lstm_gates
from skiprnn.model.engines.triton.policies import selective_backward


class Inputs(NamedTuple):
    """What the time loop reads; None where there is none."""

    x: tl.tensor  # (R, B, T, I)
    draw: tl.tensor  # (R, B, T) or (R, B, T, H)
    lengths: tl.tensor  # (R, B)


class Weights(NamedTuple):
    """Of all runs, in blocks [in, out]; None where the policy has none."""

    of_x: tl.tensor  # (R, I, X, W), the first layer's
    bias: tl.tensor  # (R, L, X, W)
    of_h: tl.tensor  # (R, L, G, W, W), in the type that the products multiply
    of_below: tl.tensor  # (R, L - 1, G, W, W), likewise
    w_p: tl.tensor  # Skip: (R, W), (R,)
    b_p: tl.tensor
    w_u: tl.tensor  # Selective: (R, W), (R,)
    slope: tl.tensor


class Saved(NamedTuple):
    """What backward needs."""

    pre: tl.tensor  # (R, L, T, B, X, W): pre-activations
    h: tl.tensor  # (R, L, T + 1, B, W): states before each step and after the last
    c: tl.tensor  # likewise; h where the cell has no c
    gate: tl.tensor  # (R, T, 3, B): Skip's q and s before each step, and what the candidate proposes as the next q


class Gradients(NamedTuple):
    """Given, of the results (None where there is none), and found."""

    output: tl.tensor  # (R, B, T, H)
    updates: tl.tensor  # (R, B, T) or (R, B, T, H)
    h: tl.tensor  # (R, L, B, W): of the last states, replaced by those of the first
    c: tl.tensor
    gate: tl.tensor  # (R, 2, B): of q and s, likewise
    pre: tl.tensor  # (R, L, T, B, X, W): found
    logit: tl.tensor  # (R, T, B): found, of what the sigmoid of Skip's proposal acts on


class Tile(NamedTuple):
    """The sequences that a program takes through time, all of one run."""

    run: tl.tensor
    sequence: tl.tensor  # (TILE,) of the batch
    exists: tl.tensor  # (TILE,) whether the batch has so many
    entry: tl.tensor  # (TILE,) among the sequences of all runs
    length: tl.tensor  # (TILE,) steps that count


@triton.jit
def tile_of(lengths, B, T, TILE: tl.constexpr):
    """This program's sequences."""
    run = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists, entry = sequence < B, run * B + sequence
    length = tl.full((TILE,), T, tl.int64)
    if lengths is not None:
        length = tl.load(lengths + entry, mask=exists, other=0)
    return Tile(run, sequence, exists, entry, length)


@triton.jit
def read(pointer, tile, B, COUNT: tl.constexpr):
    """COUNT rows of (B,) one after another: a number per sequence of each, (TILE,); 0 beyond the batch."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows += (tl.load(pointer + k * B + tile.sequence, mask=tile.exists, other=0),)
    return rows


@triton.jit
def write(pointer, tile, B, rows, COUNT: tl.constexpr):
    """Likewise."""
    for k in tl.static_range(COUNT):
        tl.store(pointer + k * B + tile.sequence, rows[k], mask=tile.exists)


@triton.jit
def load(pointer, tile, col, stride, width):
    """The elements [sequence, col] of a matrix with rows of `stride`, (TILE, BLOCK); 0 outside."""
    inside = tile.exists[:, None] & (col < width)[None, :]
    return tl.load(pointer + tile.sequence[:, None] * stride + col[None, :], mask=inside, other=0)


@triton.jit
def store(pointer, tile, col, stride, width, values):
    """Likewise."""
    inside = tile.exists[:, None] & (col < width)[None, :]
    tl.store(pointer + tile.sequence[:, None] * stride + col[None, :], values, mask=inside)


@triton.jit
def vector(pointer, col, width):
    """The elements [col] of what all sequences share, (1, BLOCK)."""
    return tl.load(pointer + col, mask=col < width, other=0)[None, :]


@triton.jit
def weight_block(weight, k, col, W: tl.constexpr, TRANSPOSED: tl.constexpr):
    """weight[k, col] of a (W, W) matrix, or of its transpose."""
    at = col[None, :] * W + k[:, None] if TRANSPOSED else k[:, None] * W + col[None, :]
    return tl.load(weight + at, mask=(k < W)[:, None] & (col < W)[None, :], other=0)


@triton.jit
def dot(rows, weight):
    """A block of rows times a block of a weight, in the weight's precision, summed in that of the rows."""
    return tl.dot(rows.to(weight.dtype), weight, input_precision="ieee", out_dtype=rows.dtype)


@triton.jit
def product(
    left, stride, scale, weight, tile, col, width, W: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """scale * left[sequence, :W] times the columns `col` of a weight or its transpose, both read from memory."""
    total = tl.zeros((tile.sequence.shape[0], BLOCK), left.dtype.element_ty)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        rows = load(left, tile, k, stride, W)
        if scale is not None:
            rows *= scale[:, None]
        total += dot(rows, weight_block(weight, k, col, W, TRANSPOSED))
    return total


@triton.jit
def largest(blocks, COUNT: tl.constexpr):
    """The largest magnitude of each row in the first of several blocks, (TILE,)."""
    found = tl.abs(blocks[0])
    for g in tl.static_range(1, COUNT):
        found = tl.maximum(found, tl.abs(blocks[g]))
    return tl.max(found, axis=1)


@triton.jit
def scaled(largest):
    """A factor per row that brings its largest element to 1, and what undoes it: gradients do not fit fp16's range."""
    some = largest > 1e-30
    return tl.where(some, 1 / tl.where(some, largest, 1), 0), tl.where(some, largest, 0)


@triton.jit
def recall(saved, step, slot, tile, n, B, X: tl.constexpr, W: tl.constexpr, LSTM: tl.constexpr):
    """The pre-activations of a step, and the state before it."""
    a = ()
    for g in tl.static_range(X):
        a += (load(saved.pre + (step * B * X + g) * W, tile, n, X * W, W),)
    h = load(saved.h + slot * B * W, tile, n, W, W)
    c = h
    if LSTM:
        c = load(saved.c + slot * B * W, tile, n, W, W)
    return a, h, c


@triton.jit
def candidate(a, h, c, LSTM: tl.constexpr):
    """h~ and c~, which is h~ where the cell has no c."""
    if LSTM:
        h_new, c_new = lstm(lstm_gates(a), c)
    else:
        h_new = gru(a[1], a[2], h)
        c_new = h_new
    return h_new, c_new


@triton.jit
def step_backward(a, h, c, D_h, D_c, d_h, d_c, d_u, u, valid, w_u, slope, LSTM: tl.constexpr, POLICY: tl.constexpr):
    """Back through one step, from D_h and D_c of the new state.

    d_h, d_c: what reaches the candidate alone, d_u: Selective's decision alone; or None. u, which neurons updated.

    Returns:
        The gradients of the pre-activations, a tuple (GRU's without r, which takes a product); D_h and D_c of the old
        state, but for the products; what the update of each neuron is worth, <D_h, h~ - h> + <D_c, c~ - c>.
    """
    h_new, c_new = candidate(a, h, c, LSTM)
    worth = D_h * (h_new - h)
    if LSTM:
        worth += D_c * (c_new - c)
    E_h, E_c = tl.where(u, D_h, 0), tl.where(u, D_c, 0)  # to the candidate; the rest passes by it
    D_h, D_c = tl.where(u, 0, D_h), tl.where(u, 0, D_c)
    if d_h is not None:
        E_h += d_h
    if d_c is not None:
        E_c += d_c
    if LSTM:
        d_i, d_j, d_f, d_o, d_old = lstm_backward(lstm_gates(a), c, E_h, E_c)
        d = (d_i, d_j, d_f, d_o)
        D_c += d_old
    else:
        d_z, d_candidate, d_old = gru_backward(a[1], a[2], h, E_h)
        d = (d_z, d_candidate)
        D_h += d_old
    if POLICY == "selective":
        d_value = worth
        if d_u is not None:
            d_value += d_u
        d_logit = selective_backward(a[4 if LSTM else 3], slope, d_value, valid)
        d += (d_logit,)
        D_h += d_logit * w_u
    return d, D_h, D_c, worth

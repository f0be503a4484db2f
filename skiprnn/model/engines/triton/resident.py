"""The time loop of one layer whose weights stay on the chip and whose states stay in registers, one launch per pass.

Shapes and arguments: see parts.py. Program (i, r) takes the i-th tile of sequences of run r through all steps.
"""
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from skiprnn.model.engines.triton.cells import reset_backward
from skiprnn.model.engines.triton.parts import (
    candidate,
    dot,
    largest,
    load,
    read,
    recall,
    scaled,
    step_backward,
    store,
    tile_of,
    vector,
    weight_block,
    write,
)
from skiprnn.model.engines.triton.policies import decide, decide_neurons, skip_after, skip_backward


@triton.jit
def held(weight, n, G: tl.constexpr, W: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The blocks of all gates, on the chip."""
    blocks = ()
    for g in tl.static_range(G):
        blocks += (weight_block(weight + g * W * W, n, n, W, TRANSPOSED),)
    return blocks


@triton.jit
def forward(
    inputs,
    weights,
    h_state,  # (R, B, W): the first, replaced by the last
    c_state,
    gate,  # (R, 2, B): q and s, likewise
    saved,
    output,  # (R, B, T, H)
    updates,  # (R, B, T) or (R, B, T, H)
    B,
    T,
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Output, updates, states; with SAVE what backward needs. INPUTS: I; 0 where saved.pre comes with x's part."""
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    tile = tile_of(inputs.lengths, B, T, TILE)
    n = tl.arange(0, BLOCK)
    counts = tile.exists[:, None] & (n < H)[None, :]
    of_h = held(weights.of_h + tile.run * G * W * W, n, G, W, False)
    bias, of_x = (), ()
    for g in tl.static_range(X if INPUTS else 0):
        bias += (vector(weights.bias + (tile.run * X + g) * W, n, W),)
        for i in tl.static_range(INPUTS):
            of_x += (vector(weights.of_x + ((tile.run * INPUTS + i) * X + g) * W, n, W),)
    h = load(h_state + tile.run * B * W, tile, n, W, W)
    c = h
    if LSTM:
        c = load(c_state + tile.run * B * W, tile, n, W, W)
    if SAVE:
        store(saved.h + tile.run * (T + 1) * B * W, tile, n, W, W, h)
        if LSTM:
            store(saved.c + tile.run * (T + 1) * B * W, tile, n, W, W, c)
    q, s, slope = 0, 0, 0
    if POLICY == "skip":
        q, s = read(gate + tile.run * 2 * B, tile, B, 2)
        w_p, b_p = vector(weights.w_p + tile.run * W, n, W), tl.load(weights.b_p + tile.run)
    if POLICY == "selective":
        w_u, slope = vector(weights.w_u + tile.run * W, n, W), tl.load(weights.slope + tile.run)
    for t in range(T):
        step = tile.run * T + t
        valid = (t < tile.length) & tile.exists
        u = decide(inputs.draw, t, T, tile, valid, q, s, POLICY)
        neuron = ((tile.entry * T + t) * H)[:, None] + n[None, :]
        proposed = q
        needed = 1
        if not SAVE and not NEURONS:  # nothing to compute where all sequences skip
            needed = tl.max(u.to(tl.int32), axis=0)
        for _ in range(needed):  # once or not at all; an `if` would load the weights into it
            a = ()
            for g in tl.static_range(X):
                pre = saved.pre + (step * B * X + g) * W
                if INPUTS:
                    part = bias[g] + tl.zeros((TILE, BLOCK), h.dtype)
                    for i in tl.static_range(INPUTS):
                        x = tl.load(inputs.x + (tile.entry * T + t) * INPUTS + i, mask=tile.exists, other=0)
                        part += x[:, None] * of_x[g * INPUTS + i]
                else:
                    part = load(pre, tile, n, X * W, W).to(h.dtype)
                if g == G:
                    part += w_u * h
                elif g == 2 and not LSTM:
                    part += dot(tl.sigmoid(a[0]) * h, of_h[g])
                else:
                    part += dot(h, of_h[g])
                if SAVE:
                    store(pre, tile, n, X * W, W, part)
                a += (part,)
            h_new, c_new = candidate(a, h, c, LSTM)
            if POLICY == "skip":
                proposed = tl.sigmoid(tl.sum(c_new * w_p, axis=1) + b_p)
            which = decide_neurons(u, inputs.draw, neuron, counts, a[X - 1], slope, POLICY)
            h, c = tl.where(which, h_new, h), tl.where(which, c_new, c)
            if NEURONS:
                tl.store(updates + neuron, which.to(h.dtype), mask=counts)
        tl.store(output + neuron, h, mask=counts)
        if not NEURONS:
            tl.store(updates + tile.entry * T + t, u.to(h.dtype), mask=tile.exists)
        if POLICY == "skip":
            if SAVE:
                write(saved.gate + step * 3 * B, tile, B, (q, s, proposed), 3)
            q, s = skip_after(q, s, proposed, u, valid)
        if SAVE:
            at = (tile.run * (T + 1) + t + 1) * B * W
            store(saved.h + at, tile, n, W, W, h)
            if LSTM:
                store(saved.c + at, tile, n, W, W, c)
    if POLICY == "skip":
        write(gate + tile.run * 2 * B, tile, B, (q, s), 2)
    store(h_state + tile.run * B * W, tile, n, W, W, h)
    if LSTM:
        store(c_state + tile.run * B * W, tile, n, W, W, c)


@triton.jit
def backward(
    lengths,
    weights,
    saved,
    updates,
    gradients,
    reset,  # GRU: r * h (R, T, B, W)
    B,
    T,
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the last step to the first: gradients of all pre-activations, and of the initial states."""
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    tile = tile_of(lengths, B, T, TILE)
    n = tl.arange(0, BLOCK)
    counts = tile.exists[:, None] & (n < H)[None, :]
    of_h = held(weights.of_h + tile.run * G * W * W, n, G, W, True)
    D_h, D_c = load(gradients.h + tile.run * B * W, tile, n, W, W), load(gradients.c + tile.run * B * W, tile, n, W, W)
    w_u, slope = 0, 0
    if POLICY == "skip":
        w_p = vector(weights.w_p + tile.run * W, n, W)
        Q, S = read(gradients.gate + tile.run * 2 * B, tile, B, 2)
    if POLICY == "selective":
        w_u, slope = vector(weights.w_u + tile.run * W, n, W), tl.load(weights.slope + tile.run)
    a, h, c = recall(saved, tile.run * T + T - 1, tile.run * (T + 1) + T - 1, tile, n, B, X, W, LSTM)
    for back in range(T):
        t = T - 1 - back
        step = tile.run * T + t
        valid = (t < tile.length) & tile.exists
        neuron = ((tile.entry * T + t) * H)[:, None] + n[None, :]
        d_h, d_c, d_u = None, None, None
        if gradients.output is not None:
            D_h += tl.load(gradients.output + neuron, mask=counts, other=0)
        if NEURONS:
            u = tl.load(updates + neuron, mask=counts, other=0) > 0.5
            if gradients.updates is not None:
                d_u = tl.load(gradients.updates + neuron, mask=counts, other=0)
        else:
            u_row = tl.load(updates + tile.entry * T + t, mask=tile.exists, other=0) > 0.5
            u = u_row[:, None]
        if POLICY == "skip":
            q, s, proposed = read(saved.gate + step * 3 * B, tile, B, 3)
            d_proposed = tl.where(u_row, Q * proposed * (1 - proposed), 0)
            tl.store(gradients.logit + step * B + tile.sequence, d_proposed, mask=tile.exists)
            d_c = d_proposed[:, None] * w_p
            if not LSTM:
                d_h = d_c
        d, D_h, D_c, worth = step_backward(a, h, c, D_h, D_c, d_h, d_c, d_u, u, valid, w_u, slope, LSTM, POLICY)
        if POLICY == "skip":
            of_update = tl.sum(worth, axis=1)
            if gradients.updates is not None:
                of_update += tl.load(gradients.updates + tile.entry * T + t, mask=tile.exists, other=0)
            Q, S = skip_backward(Q, S, q, s, proposed, of_update, u_row, valid)
        r, h_now = tl.sigmoid(a[0]), h
        ahead = tl.maximum(t - 1, 0)  # read while the products run
        a, h, c = recall(saved, tile.run * T + ahead, tile.run * (T + 1) + ahead, tile, n, B, X, W, LSTM)
        if not LSTM:
            scale, undo = scaled(largest(d[1:2], 1))
            d_r, d_reset = reset_backward(r, h_now, dot(d[1] * scale[:, None], of_h[2]) * undo[:, None])
            D_h += d_reset
            d = (d_r,) + d  # noqa: RUF005  (Triton has no stars)
            store(reset + step * B * W, tile, n, W, W, r * h_now)
        for g in tl.static_range(X):
            store(gradients.pre + (step * B * X + g) * W, tile, n, X * W, W, d[g])
        scale, undo = scaled(largest(d, G if LSTM else 2))
        total = tl.zeros((TILE, BLOCK), D_h.dtype)
        for g in tl.static_range(G if LSTM else 2):
            total += dot(d[g] * scale[:, None], of_h[g])
        D_h += total * undo[:, None]
    if POLICY == "skip":
        write(gradients.gate + tile.run * 2 * B, tile, B, (Q, S), 2)
    store(gradients.h + tile.run * B * W, tile, n, W, W, D_h)
    store(gradients.c + tile.run * B * W, tile, n, W, W, D_c)

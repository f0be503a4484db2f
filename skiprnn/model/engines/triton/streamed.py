"""The time loop of a stack of any width, one launch per pass: states pass through memory, and weights are read block by
block, from the L2 cache, at every step.

Shapes and arguments: see parts.py. Program (i, r) takes the i-th tile of sequences of run r through all steps.
"""

import triton
import triton.language as tl

from skiprnn.model.engines.triton.cells import reset_backward
from skiprnn.model.engines.triton.parts import (
    candidate,
    largest,
    load,
    product,
    read,
    recall,
    scaled,
    step_backward,
    store,
    tile_of,
    vector,
    write,
)
from skiprnn.model.engines.triton.policies import decide, decide_neurons, skip_after, skip_backward


@triton.jit
def pre_activation(
    g,
    left,
    x,
    below,
    pre,
    weights,
    tile,
    col,
    width,
    LAYER: tl.constexpr,
    L: tl.constexpr,
    INPUTS: tl.constexpr,
    G: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate g's in columns `col`, but for w_u h; left: what the recurrent product reads; x: pointers to the inputs."""
    layer = tile.run * L + LAYER
    if LAYER == 0 and INPUTS == 0:
        total = load(pre + g * W, tile, col, X * W, W)
    else:
        bias = vector(weights.bias + (layer * X + g) * W, col, W)
        total = bias + tl.zeros((tile.sequence.shape[0], BLOCK), bias.dtype)
        if LAYER == 0:
            for i in tl.static_range(INPUTS):
                of_x = vector(weights.of_x + ((tile.run * INPUTS + i) * X + g) * W, col, W)
                total += tl.load(x + i, mask=tile.exists, other=0)[:, None] * of_x
        else:
            of_below = weights.of_below + ((tile.run * (L - 1) + LAYER - 1) * G + g) * W * W
            total += product(below, W, None, of_below, tile, col, width, W, BLOCK, False)
    if g < G:
        total += product(left, W, None, weights.of_h + (layer * G + g) * W * W, tile, col, width, W, BLOCK, False)
    return total


@triton.jit
def forward(
    inputs,
    weights,
    h_states,  # (R, L, slots, B, W): saved.h with SAVE; else two slots that take turns. The first holds the first state
    c_states,
    gate,  # (R, 2, B): q and s, replaced by the last
    saved,
    output,  # (R, B, T, H)
    updates,  # (R, B, T) or (R, B, T, H)
    candidates,  # scratch (R, L, B, W), which the layer above reads
    reset,  # scratch (R, B, W): GRU's r * h
    B,
    T,
    width,  # W, not known to the compiler, which would unroll all loops over blocks
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
    L: tl.constexpr,
):
    """Output, updates, states; with SAVE what backward needs. INPUTS: I; 0 where saved.pre comes with x's part."""
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    FIRST: tl.constexpr = 0 if LSTM else 1  # GRU's r has a pass of its own
    tile = tile_of(inputs.lengths, B, T, TILE)
    n = tl.arange(0, BLOCK)
    reset += tile.run * B * W
    slots = T + 1 if SAVE else 2
    q, s, slope = 0, 0, 0
    if POLICY == "skip":
        q, s = read(gate + tile.run * 2 * B, tile, B, 2)
        b_p = tl.load(weights.b_p + tile.run)
    if POLICY == "selective":
        slope = tl.load(weights.slope + tile.run)
    for t in range(T):
        valid = (t < tile.length) & tile.exists
        u = decide(inputs.draw, t, T, tile, valid, q, s, POLICY)
        x = inputs.x + (tile.entry * T + t) * INPUTS
        logit = tl.zeros((TILE,), h_states.dtype.element_ty)
        for layer in tl.static_range(L):
            of_layer = tile.run * L + layer
            pre = saved.pre + (of_layer * T + t) * B * X * W
            now = (of_layer * slots + t % slots) * B * W
            after = (of_layer * slots + (t + 1) % slots) * B * W
            h_now, mine = h_states + now, candidates + of_layer * B * W
            if not LSTM:
                for start in range(0, width, BLOCK):
                    col = start + n
                    a_r = pre_activation(
                        0, h_now, x, mine - B * W, pre, weights, tile, col, width, layer, L, INPUTS, G, X, W, BLOCK
                    )
                    if SAVE:
                        store(pre, tile, col, X * W, W, a_r)
                    store(reset, tile, col, W, W, tl.sigmoid(a_r) * load(h_now, tile, col, W, W))
                tl.debug_barrier()
            for start in range(0, width, BLOCK):
                col = start + n
                counts = tile.exists[:, None] & (col < H)[None, :]
                neuron = ((tile.entry * T + t) * H)[:, None] + col[None, :]
                h = load(h_now, tile, col, W, W)
                c = h
                if LSTM:
                    c = load(c_states + now, tile, col, W, W)
                a = (None,) * FIRST
                for g in tl.static_range(FIRST, X):
                    left = reset if g == 2 and not LSTM else h_now
                    part = pre_activation(
                        g, left, x, mine - B * W, pre, weights, tile, col, width, layer, L, INPUTS, G, X, W, BLOCK
                    )
                    if g == G:
                        part += vector(weights.w_u + tile.run * W, col, W) * h
                    if SAVE:
                        store(pre + g * W, tile, col, X * W, W, part)
                    a += (part,)
                h_new, c_new = candidate(a, h, c, LSTM)
                if layer + 1 < L:
                    store(mine, tile, col, W, W, h_new)
                elif POLICY == "skip":
                    logit += tl.sum(c_new * vector(weights.w_p + tile.run * W, col, W), axis=1)
                which = decide_neurons(u, inputs.draw, neuron, counts, a[X - 1], slope, POLICY)
                h, c = tl.where(which, h_new, h), tl.where(which, c_new, c)
                store(h_states + after, tile, col, W, W, h)
                if LSTM:
                    store(c_states + after, tile, col, W, W, c)
                if layer + 1 == L:
                    tl.store(output + neuron, h, mask=counts)
                if NEURONS:
                    tl.store(updates + neuron, which.to(h.dtype), mask=counts)
            tl.debug_barrier()
        if not NEURONS:
            tl.store(updates + tile.entry * T + t, u.to(logit.dtype), mask=tile.exists)
        if POLICY == "skip":
            proposed = tl.sigmoid(logit + b_p)
            if SAVE:
                write(saved.gate + (tile.run * T + t) * 3 * B, tile, B, (q, s, proposed), 3)
            q, s = skip_after(q, s, proposed, u, valid)
    if POLICY == "skip":
        write(gate + tile.run * 2 * B, tile, B, (q, s), 2)


@triton.jit
def backward(
    lengths,
    weights,
    saved,
    updates,
    gradients,
    reset,  # GRU: r * h (R, L, T, B, W)
    d_below,  # scratch (R, B, W): of the candidates that the layer above read
    B,
    T,
    width,
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
):
    """From the last step to the first: gradients of all pre-activations, and of the initial states."""
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    FIRST: tl.constexpr = 0 if LSTM else 1
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    tile = tile_of(lengths, B, T, TILE)
    n = tl.arange(0, BLOCK)
    d_below += tile.run * B * W
    slope = 0
    if POLICY == "skip":
        Q, S = read(gradients.gate + tile.run * 2 * B, tile, B, 2)
    if POLICY == "selective":
        slope = tl.load(weights.slope + tile.run)
    for back in range(T):
        t = T - 1 - back
        valid = (t < tile.length) & tile.exists
        u = tl.load(updates + tile.entry * T + t, mask=tile.exists, other=0) > 0.5 if not NEURONS else valid
        of_update = tl.zeros((TILE,), gradients.h.dtype.element_ty)
        if POLICY == "skip":
            q, s, proposed = read(saved.gate + (tile.run * T + t) * 3 * B, tile, B, 3)
            d_proposed = tl.where(u, Q * proposed * (1 - proposed), 0)
            tl.store(gradients.logit + (tile.run * T + t) * B + tile.sequence, d_proposed, mask=tile.exists)
            if gradients.updates is not None:
                of_update += tl.load(gradients.updates + tile.entry * T + t, mask=tile.exists, other=0)
        for layer in tl.static_range(L - 1, -1, -1):
            of_layer = tile.run * L + layer
            step = of_layer * T + t
            pre, r_h = gradients.pre + step * B * X * W, reset + step * B * W
            h_gradient, c_gradient = gradients.h + of_layer * B * W, gradients.c + of_layer * B * W
            of_h = weights.of_h + of_layer * G * W * W
            of_below = weights.of_below + (tile.run * (L - 1) + layer - 1) * G * W * W
            highest = tl.zeros((TILE,), gradients.h.dtype.element_ty)
            for start in range(0, width, BLOCK):
                col = start + n
                counts = tile.exists[:, None] & (col < H)[None, :]
                neuron = ((tile.entry * T + t) * H)[:, None] + col[None, :]
                a, h, c = recall(saved, step, of_layer * (T + 1) + t, tile, col, B, X, W, LSTM)
                D_h, D_c = load(h_gradient, tile, col, W, W), load(c_gradient, tile, col, W, W)
                d_h, d_c, d_u = None, None, None
                which, w_u = u[:, None], 0
                if layer + 1 < L:
                    d_h = load(d_below, tile, col, W, W)
                else:
                    if gradients.output is not None:
                        D_h += tl.load(gradients.output + neuron, mask=counts, other=0)
                    if POLICY == "skip":
                        d_c = d_proposed[:, None] * vector(weights.w_p + tile.run * W, col, W)
                        if not LSTM:
                            d_h = d_c
                if NEURONS:
                    which = tl.load(updates + neuron, mask=counts, other=0) > 0.5
                if POLICY == "selective":
                    w_u = vector(weights.w_u + tile.run * W, col, W)
                    if gradients.updates is not None:
                        d_u = tl.load(gradients.updates + neuron, mask=counts, other=0)
                d, D_h, D_c, worth = step_backward(
                    a, h, c, D_h, D_c, d_h, d_c, d_u, which, valid, w_u, slope, LSTM, POLICY
                )
                of_update += tl.sum(worth, axis=1)
                for g in tl.static_range(FIRST, X):
                    store(pre + g * W, tile, col, X * W, W, d[g - FIRST])
                store(h_gradient, tile, col, W, W, D_h)
                if LSTM:
                    store(c_gradient, tile, col, W, W, D_c)
                    highest = tl.maximum(highest, largest(d, G))
                else:
                    store(r_h, tile, col, W, W, tl.sigmoid(a[0]) * h)
                    highest = tl.maximum(highest, largest(d, 2))
            tl.debug_barrier()
            scale, undo = scaled(highest)
            if not LSTM:
                for start in range(0, width, BLOCK):
                    col = start + n
                    a, h, c = recall(saved, step, of_layer * (T + 1) + t, tile, col, B, X, W, LSTM)
                    d_rh = product(pre + 2 * W, X * W, scale, of_h + 2 * W * W, tile, col, width, W, BLOCK, True)
                    d_r, d_reset = reset_backward(tl.sigmoid(a[0]), h, d_rh * undo[:, None])
                    store(pre, tile, col, X * W, W, d_r)
                    store(h_gradient, tile, col, W, W, load(h_gradient, tile, col, W, W) + d_reset)
                    highest = tl.maximum(highest, largest((d_r,), 1))
                tl.debug_barrier()
                scale, undo = scaled(highest)
            for start in range(0, width, BLOCK):
                col = start + n
                total = tl.zeros((TILE, BLOCK), undo.dtype)
                lower = total
                for g in tl.static_range(G):
                    if LSTM or g < 2:
                        total += product(pre + g * W, X * W, scale, of_h + g * W * W, tile, col, width, W, BLOCK, True)
                    if layer > 0:
                        d_g = pre + g * W
                        lower += product(d_g, X * W, scale, of_below + g * W * W, tile, col, width, W, BLOCK, True)
                D_h = load(h_gradient, tile, col, W, W) + total * undo[:, None]
                store(h_gradient, tile, col, W, W, D_h)
                if layer > 0:
                    store(d_below, tile, col, W, W, lower * undo[:, None])
            tl.debug_barrier()
        if POLICY == "skip":
            Q, S = skip_backward(Q, S, q, s, proposed, of_update, u, valid)
    if POLICY == "skip":
        write(gradients.gate + tile.run * 2 * B, tile, B, (Q, S), 2)

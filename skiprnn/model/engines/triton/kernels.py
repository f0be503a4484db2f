"""The time loop as one launch per pass: a program takes a tile of rows of one run through all steps.

Shapes: R runs, B batch, T steps, I input, H hidden of the top layer, L layers, G gates (LSTM i j f o, GRU r z
candidate), X = G and Selective's gate, W = H of the widest layer padded to 16; what is beyond a layer's H stays 0.

    x (R, B, T, I), x_weight (R, I, X, W), bias (R, L, X, W), weight and input_weight (R, L or L - 1, G, W in, W out)
    pre and its gradient (R, L, T, B, X, W): pre-activations;  h, c (R, L, T + 1, B, W): states before each step
    gate (R, 3, T, B): Skip's q and s before each step, and what the candidate proposes as the next q
    output (R, B, T, H);  updates, draw (R, B, T) or (R, B, T, H);  lengths (R, B)

RESIDENT: one layer of one block; states live in registers, weights are loaded once. Otherwise states pass through
memory, and weights are read block by block (from the L2 cache) at every step.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def block(pointer, row, col, stride, inside):
    """The elements [row, col] of a matrix with rows of `stride`, zeros outside."""
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=inside, other=0)


@triton.jit
def tile(weight, k, n, W: tl.constexpr, TRANSPOSED: tl.constexpr):
    """weight[k, n] of a (W, W) matrix, or of its transpose."""
    at = n[None, :] * W + k[:, None] if TRANSPOSED else k[:, None] * W + n[None, :]
    return tl.load(weight + at, mask=(k < W)[:, None] & (n < W)[None, :], other=0)


@triton.jit
def dot(a, weight):
    """A tile of rows times a tile of a weight, in the weight's precision, summed in that of the rows."""
    return tl.dot(a.to(weight.dtype), weight, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def product(
    a, scale, weight, row, n, stride, inside, stop, W: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """scale * a[row, :W] times the columns n of a weight or its transpose, both read from memory."""
    total = tl.zeros((row.shape[0], BLOCK), a.dtype.element_ty)
    for start in range(0, stop, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = block(a, row, k, stride, inside[:, None] & (k < W)[None, :])
        total += dot(left * scale[:, None], tile(weight, k, n, W, TRANSPOSED))
    return total


@triton.jit
def from_input(
    g,
    x,
    x_weight,
    bias,
    pre,
    below,
    input_weight,
    row,
    n,
    in_batch,
    one,
    stop,
    INPUTS: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """The input's part of gate g's pre-activations in columns n; x points to each row's inputs of this step."""
    if FIRST and PROJECTED:
        return block(pre + g * W, row, n, X * W, in_batch[:, None] & (n < W)[None, :])
    total = tl.load(bias + g * W + n, mask=n < W, other=0)[None, :] + tl.zeros((row.shape[0], BLOCK), one.dtype)
    if FIRST:  # so few inputs that a product of all steps in advance is not worth its memory
        for i in tl.static_range(INPUTS):
            weight = tl.load(x_weight + (i * X + g) * W + n, mask=n < W, other=0)
            total += tl.load(x + i, mask=in_batch, other=0)[:, None] * weight[None, :]
    else:
        total += product(below, one, input_weight + g * W * W, row, n, W, in_batch, stop, W, BLOCK, False)
    return total


@triton.jit
def forward(
    x,
    x_weight,
    bias,
    weight,
    input_weight,
    w_p,  # Skip: (R, W), (R,)
    b_p,
    w_u,  # Selective: (R, W), (R,)
    slope,
    draw,
    lengths,
    pre,
    h,
    c,
    candidate,  # scratch: candidates (R, L, B, W), which the layer above reads; r * h (R, B, W)
    reset,
    gate,
    last_gate,  # (R, 2, B): q and s, replaced by those after the last step
    output,
    updates,
    B,
    T,
    SLOTS,
    width,  # W, not known to the compiler, which would unroll all loops over blocks
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    INPUTS: tl.constexpr,
    L: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
    PROJECTED: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Output, updates, states; with SAVE what backward needs. PROJECTED: pre comes with the first layer's input part.

    SLOTS is T + 1; or 1 where states stay in registers and nothing is saved: h and c are replaced by the last ones.
    """
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    STORED: tl.constexpr = SAVE or not RESIDENT
    stop = W if RESIDENT else width
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.arange(0, BLOCK)
    in_batch = row < B
    sequence = run * B + row
    one = tl.full((TILE,), 1, h.dtype.element_ty)
    state_size, pre_size = (run * 0 + SLOTS) * B * W, (run * 0 + T) * B * X * W  # of a layer
    h += run * L * state_size
    c += run * L * state_size
    pre += run * L * pre_size
    x_row, out_row = x + sequence * T * INPUTS, output + sequence * T * H
    decision = sequence * T * H if NEURONS else sequence * T
    x_weight += run * INPUTS * X * W
    bias += run * L * X * W
    weight += run * L * G * W * W
    input_weight += run * (L - 1) * G * W * W
    candidate += run * L * B * W
    reset += run * B * W
    length = tl.full((TILE,), T, tl.int64)
    if lengths is not None:
        length = tl.load(lengths + sequence, mask=in_batch, other=0)
    if POLICY == "skip":
        gate += run * 3 * T * B
        q = tl.load(last_gate + run * 2 * B + row, mask=in_batch, other=0)
        s = tl.load(last_gate + run * 2 * B + B + row, mask=in_batch, other=0)
        bias_p = tl.load(b_p + run)
    if POLICY == "selective":
        slope_now = tl.load(slope + run)
    if RESIDENT:
        w0, w1 = tile(weight, n, n, W, False), tile(weight + W * W, n, n, W, False)
        w2 = tile(weight + 2 * W * W, n, n, W, False)
        if LSTM:
            w3 = tile(weight + 3 * W * W, n, n, W, False)
        h_old = block(h, row, n, W, in_batch[:, None] & (n < W)[None, :])
        c_old = h_old
        if LSTM:
            c_old = block(c, row, n, W, in_batch[:, None] & (n < W)[None, :])
    for t in range(T):
        valid = (t < length) & in_batch
        u_row = valid
        if POLICY == "random_steps":
            u_row = valid & (tl.load(draw + decision, mask=in_batch, other=0) > 0.5)
        if POLICY == "skip":
            accumulated = s + tl.minimum(q, 1 - s)
            u_row = valid & (accumulated > 0.5)
            if SAVE:
                tl.store(gate + row, q, mask=in_batch)
                tl.store(gate + T * B + row, s, mask=in_batch)
        logit = one * 0
        needed = 1
        if not STORED and not NEURONS:  # inference: nothing to compute where the whole tile skips
            needed = tl.max(u_row.to(tl.int32), axis=0)
        for _ in range(needed):  # once or not at all; an `if` would load the weights into it
            for layer in tl.static_range(L):
                h_now, c_now, pre_now = h + layer * state_size, c + layer * state_size, pre + layer * pre_size
                w, b = weight + layer * G * W * W, bias + layer * X * W
                below, w_below = candidate + (layer - 1) * B * W, input_weight + (layer - 1) * G * W * W
                if not RESIDENT and not LSTM:  # all of r * h, before any candidate
                    for start in range(0, stop, BLOCK):
                        col = start + n
                        inside = in_batch[:, None] & (col < W)[None, :]
                        a0 = from_input(
                            0,
                            x_row,
                            x_weight,
                            b,
                            pre_now,
                            below,
                            w_below,
                            row,
                            col,
                            in_batch,
                            one,
                            stop,
                            INPUTS,
                            X,
                            W,
                            BLOCK,
                            layer == 0,
                            PROJECTED,
                        )
                        a0 += product(h_now, one, w, row, col, W, in_batch, stop, W, BLOCK, False)
                        if SAVE:
                            tl.store(pre_now + row[:, None] * (X * W) + col[None, :], a0, mask=inside)
                        rh = tl.sigmoid(a0) * block(h_now, row, col, W, inside)
                        tl.store(reset + row[:, None] * W + col[None, :], rh, mask=inside)
                    tl.debug_barrier()
                for start in range(0, stop, BLOCK):
                    col = start + n
                    inside = in_batch[:, None] & (col < W)[None, :]
                    at, pre_at = row[:, None] * W + col[None, :], row[:, None] * (X * W) + col[None, :]
                    if not RESIDENT:
                        h_old = tl.load(h_now + at, mask=inside, other=0)
                        c_old = h_old
                        if LSTM:
                            c_old = tl.load(c_now + at, mask=inside, other=0)
                    a1 = from_input(
                        1,
                        x_row,
                        x_weight,
                        b,
                        pre_now,
                        below,
                        w_below,
                        row,
                        col,
                        in_batch,
                        one,
                        stop,
                        INPUTS,
                        X,
                        W,
                        BLOCK,
                        layer == 0,
                        PROJECTED,
                    )
                    a2 = from_input(
                        2,
                        x_row,
                        x_weight,
                        b,
                        pre_now,
                        below,
                        w_below,
                        row,
                        col,
                        in_batch,
                        one,
                        stop,
                        INPUTS,
                        X,
                        W,
                        BLOCK,
                        layer == 0,
                        PROJECTED,
                    )
                    if LSTM or RESIDENT:
                        a0 = from_input(
                            0,
                            x_row,
                            x_weight,
                            b,
                            pre_now,
                            below,
                            w_below,
                            row,
                            col,
                            in_batch,
                            one,
                            stop,
                            INPUTS,
                            X,
                            W,
                            BLOCK,
                            layer == 0,
                            PROJECTED,
                        )
                    if LSTM:
                        a3 = from_input(
                            3,
                            x_row,
                            x_weight,
                            b,
                            pre_now,
                            below,
                            w_below,
                            row,
                            col,
                            in_batch,
                            one,
                            stop,
                            INPUTS,
                            X,
                            W,
                            BLOCK,
                            layer == 0,
                            PROJECTED,
                        )
                    if POLICY == "selective":
                        a_u = from_input(
                            G,
                            x_row,
                            x_weight,
                            b,
                            pre_now,
                            below,
                            w_below,
                            row,
                            col,
                            in_batch,
                            one,
                            stop,
                            INPUTS,
                            X,
                            W,
                            BLOCK,
                            layer == 0,
                            PROJECTED,
                        )
                        a_u += tl.load(w_u + run * W + col, mask=col < W, other=0)[None, :] * h_old
                    if RESIDENT:
                        a0 += dot(h_old, w0)
                        a1 += dot(h_old, w1)
                        if LSTM:
                            a2 += dot(h_old, w2)
                            a3 += dot(h_old, w3)
                        else:
                            a2 += dot(tl.sigmoid(a0) * h_old, w2)
                    else:
                        a1 += product(h_now, one, w + W * W, row, col, W, in_batch, stop, W, BLOCK, False)
                        if LSTM:
                            a0 += product(h_now, one, w, row, col, W, in_batch, stop, W, BLOCK, False)
                            a2 += product(h_now, one, w + 2 * W * W, row, col, W, in_batch, stop, W, BLOCK, False)
                            a3 += product(h_now, one, w + 3 * W * W, row, col, W, in_batch, stop, W, BLOCK, False)
                        else:
                            a2 += product(reset, one, w + 2 * W * W, row, col, W, in_batch, stop, W, BLOCK, False)
                    if SAVE:
                        tl.store(pre_now + pre_at + W, a1, mask=inside)
                        tl.store(pre_now + pre_at + 2 * W, a2, mask=inside)
                        if LSTM or RESIDENT:
                            tl.store(pre_now + pre_at, a0, mask=inside)
                        if LSTM:
                            tl.store(pre_now + pre_at + 3 * W, a3, mask=inside)
                        if POLICY == "selective":
                            tl.store(pre_now + pre_at + G * W, a_u, mask=inside)
                    if LSTM:
                        c_new = c_old * tl.sigmoid(a2) + tl.sigmoid(a0) * tanh(a1)
                        h_new = tanh(c_new) * tl.sigmoid(a3)
                    else:
                        z = tl.sigmoid(a1)
                        h_new = z * h_old + (1 - z) * tanh(a2)
                        c_new = h_new
                    if layer + 1 < L:
                        tl.store(candidate + layer * B * W + at, h_new, mask=inside)
                    elif POLICY == "skip":
                        logit += tl.sum(c_new * tl.load(w_p + run * W + col, mask=col < W, other=0)[None, :], axis=1)
                    u = u_row[:, None] & inside
                    of_neuron, counts = decision[:, None] + col[None, :], inside & (col < H)[None, :]
                    if POLICY == "selective":
                        u = u & ((a_u * slope_now + 1) / 2 > 0.5)
                    if POLICY == "random_neurons":
                        u = u & (tl.load(draw + of_neuron, mask=counts, other=0) > 0.5)
                    if NEURONS:
                        tl.store(updates + of_neuron, u.to(one.dtype), mask=counts)
                    h_new, c_new = tl.where(u, h_new, h_old), tl.where(u, c_new, c_old)
                    if layer + 1 == L:
                        tl.store(out_row[:, None] + col[None, :], h_new, mask=counts)
                    if STORED:
                        tl.store(h_now + B * W + at, h_new, mask=inside)
                        if LSTM:
                            tl.store(c_now + B * W + at, c_new, mask=inside)
                    if RESIDENT:
                        h_old, c_old = h_new, c_new
                if not RESIDENT:
                    tl.debug_barrier()
        if not STORED and needed == 0:
            tl.store(out_row[:, None] + n[None, :], h_old, mask=in_batch[:, None] & (n < H)[None, :])
        if not NEURONS:
            tl.store(updates + decision, u_row.to(one.dtype), mask=in_batch)
        if POLICY == "skip":
            proposed = tl.sigmoid(logit + bias_p)
            if SAVE:
                tl.store(gate + 2 * T * B + row, proposed, mask=in_batch)
            q = tl.where(u_row, proposed, q)
            s = tl.where(u_row, 0, tl.where(valid, accumulated, s))
            gate += B
        x_row += INPUTS
        out_row += H
        decision += H if NEURONS else 1
        pre += B * X * W
        if STORED:
            h += B * W
            c += B * W
    if POLICY == "skip":
        tl.store(last_gate + run * 2 * B + row, q, mask=in_batch)
        tl.store(last_gate + run * 2 * B + B + row, s, mask=in_batch)
    if not STORED:
        tl.store(h + row[:, None] * W + n[None, :], h_old, mask=in_batch[:, None] & (n < W)[None, :])
        if LSTM:
            tl.store(c + row[:, None] * W + n[None, :], c_old, mask=in_batch[:, None] & (n < W)[None, :])


@triton.jit
def recall(pre, h, c, row, n, in_batch, X: tl.constexpr, W: tl.constexpr, LSTM: tl.constexpr):
    """A step's pre-activations (four, then Selective's) and the state before it; what a cell has not is a copy."""
    inside = in_batch[:, None] & (n < W)[None, :]
    a0, a1 = block(pre, row, n, X * W, inside), block(pre + W, row, n, X * W, inside)
    a2, a_u = block(pre + 2 * W, row, n, X * W, inside), block(pre + (X - 1) * W, row, n, X * W, inside)
    h_old = block(h, row, n, W, inside)
    a3, c_old = a2, h_old
    if LSTM:
        a3, c_old = block(pre + 3 * W, row, n, X * W, inside), block(c, row, n, W, inside)
    return a0, a1, a2, a3, a_u, h_old, c_old


@triton.jit
def inverse(largest):
    """A factor per row that brings its largest element to 1, and what undoes it: gradients do not fit fp16's range."""
    some = largest > 1e-30
    return tl.where(some, 1 / tl.where(some, largest, 1), 0), tl.where(some, largest, 0)


@triton.jit
def backward(
    weight,
    input_weight,
    w_p,
    w_u,
    slope,
    lengths,
    updates,
    pre,
    h,
    c,
    gate,
    d_output,
    d_updates,
    d_pre,
    d_h,  # (R, L, B, W): of the last states, replaced by those of the first
    d_c,
    d_below,  # scratch (R, B, W): of the candidates that the layer above read
    d_gate,  # (R, 2, B): of q and s, likewise
    d_logit,  # (R, T, B): of what the sigmoid of Skip's proposal acts on
    reset,  # GRU: r * h (R, T, B, W) of the one layer, (R, L, T, B, W)
    B,
    T,
    width,
    LSTM: tl.constexpr,
    POLICY: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """From the last step to the first: gradients of all pre-activations, and of the initial states.

    At a step t of a row, with the gradients D_h, D_c, Q, S of what is after it and a = s + min(q, 1 - s):
        du = <D_h, h~ - h> + <D_c, c~ - c> + Q (p~ - q) - S a + d_updates;    da = du + (1 - u) S
        Q <- (1 - u) Q + da [q < 1 - s],  S <- da [q < 1 - s],  half of each at a tie
    """
    G: tl.constexpr = 4 if LSTM else 3
    X: tl.constexpr = G + 1 if POLICY == "selective" else G
    NEURONS: tl.constexpr = POLICY == "selective" or POLICY == "random_neurons"
    stop = W if RESIDENT else width
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.arange(0, BLOCK)
    in_batch = row < B
    sequence = run * B + row
    one = tl.full((TILE,), 1, h.dtype.element_ty)
    state_size, pre_size = (run * 0 + T + 1) * B * W, (run * 0 + T) * B * X * W
    h += run * L * state_size + state_size - 2 * B * W  # the states before the last step
    c += run * L * state_size + state_size - 2 * B * W
    pre += run * L * pre_size + pre_size - B * X * W
    d_pre += run * L * pre_size + pre_size - B * X * W
    reset_size = (run * 0 + T) * B * W
    reset += run * L * reset_size + reset_size - B * W
    d_h += run * L * B * W
    d_c += run * L * B * W
    d_below += run * B * W
    out_row = sequence * T * H + (run * 0 + T - 1) * H
    decision = out_row if NEURONS else sequence * T + T - 1
    weight += run * L * G * W * W
    input_weight += run * (L - 1) * G * W * W
    length = tl.full((TILE,), T, tl.int64)
    if lengths is not None:
        length = tl.load(lengths + sequence, mask=in_batch, other=0)
    if POLICY == "skip":
        gate += run * 3 * T * B + (T - 1) * B
        d_logit += run * T * B + (T - 1) * B
        Q = tl.load(d_gate + run * 2 * B + row, mask=in_batch, other=0)
        S = tl.load(d_gate + run * 2 * B + B + row, mask=in_batch, other=0)
    if POLICY == "selective":
        slope_now = tl.load(slope + run)
    if RESIDENT:
        w0, w1 = tile(weight, n, n, W, True), tile(weight + W * W, n, n, W, True)
        w2 = tile(weight + 2 * W * W, n, n, W, True)
        if LSTM:
            w3 = tile(weight + 3 * W * W, n, n, W, True)
        inside = in_batch[:, None] & (n < W)[None, :]
        D_h, D_c = block(d_h, row, n, W, inside), block(d_c, row, n, W, inside)
        a0, a1, a2, a3, a_u, h_old, c_old = recall(pre, h, c, row, n, in_batch, X, W, LSTM)
    for step in range(T):
        valid = (T - 1 - step < length) & in_batch
        u_row = valid
        if not NEURONS:
            u_row = tl.load(updates + decision, mask=in_batch, other=0) > 0.5
        worth, d_proposed = one * 0, one * 0
        if POLICY == "skip":
            proposed = tl.load(gate + 2 * T * B + row, mask=in_batch, other=0)
            d_proposed = tl.where(u_row, Q * proposed * (1 - proposed), 0)
            tl.store(d_logit + row, d_proposed, mask=in_batch)
        for above in tl.static_range(L):
            layer: tl.constexpr = L - 1 - above
            h_now, c_now, pre_now = h + layer * state_size, c + layer * state_size, pre + layer * pre_size
            d_now, reset_now = d_pre + layer * pre_size, reset + layer * reset_size
            dh_now, dc_now = d_h + layer * B * W, d_c + layer * B * W
            w, w_below = weight + layer * G * W * W, input_weight + (layer - 1) * G * W * W
            largest = one * 0
            if RESIDENT:  # what is needed after the loop over the one block
                nothing = tl.zeros((TILE, BLOCK), one.dtype)
                g0, d0, d1, d2, d3 = nothing, nothing, nothing, nothing, nothing
            for start in range(0, stop, BLOCK):
                col = start + n
                inside = in_batch[:, None] & (col < W)[None, :]
                at, pre_at = row[:, None] * W + col[None, :], row[:, None] * (X * W) + col[None, :]
                of_neuron, counts = decision[:, None] + col[None, :], inside & (col < H)[None, :]
                if not RESIDENT:
                    a0, a1, a2, a3, a_u, h_old, c_old = recall(pre_now, h_now, c_now, row, col, in_batch, X, W, LSTM)
                    D_h, D_c = tl.load(dh_now + at, mask=inside, other=0), tl.load(dc_now + at, mask=inside, other=0)
                if layer + 1 == L and d_output is not None:
                    D_h += tl.load(d_output + out_row[:, None] + col[None, :], mask=counts, other=0)
                g0, g1 = tl.sigmoid(a0), tl.sigmoid(a1)
                g2, g3 = tanh(a2), tl.sigmoid(a3)
                if LSTM:
                    g1, g2 = tanh(a1), tl.sigmoid(a2)
                    c_new = c_old * g2 + g0 * g1
                    tanh_c = tanh(c_new)
                    h_new = tanh_c * g3
                    gain = D_h * (h_new - h_old) + D_c * (c_new - c_old)
                else:
                    h_new = g1 * h_old + (1 - g1) * g2
                    gain = D_h * (h_new - h_old)
                u = u_row[:, None] & inside
                if POLICY == "skip":
                    worth += tl.sum(gain, axis=1)
                if NEURONS:
                    u = tl.load(updates + of_neuron, mask=counts, other=0) > 0.5
                # what goes to the candidate, and what passes by it to the old state
                E_h, E_c = tl.where(u, D_h, 0), tl.where(u, D_c, 0)
                D_h, D_c = tl.where(u, 0, D_h), tl.where(u, 0, D_c)
                if POLICY == "selective":
                    ramp = (a_u * slope_now + 1) / 2
                    if d_updates is not None:
                        gain += tl.load(d_updates + of_neuron, mask=counts, other=0)
                    d_u = tl.where((ramp >= 0) & (ramp <= 1) & valid[:, None], gain * slope_now / 2, 0)
                    tl.store(d_now + pre_at + G * W, d_u, mask=inside)
                    D_h += d_u * tl.load(w_u + run * W + col, mask=col < W, other=0)[None, :]
                if layer + 1 < L:
                    E_h += tl.load(d_below + at, mask=inside, other=0)
                if POLICY == "skip" and layer + 1 == L:
                    top = d_proposed[:, None] * tl.load(w_p + run * W + col, mask=col < W, other=0)[None, :]
                    if LSTM:
                        E_c += top
                    else:
                        E_h += top
                if LSTM:
                    E_c += E_h * g3 * (1 - tanh_c * tanh_c)
                    d0, d1 = E_c * g1 * g0 * (1 - g0), E_c * g0 * (1 - g1 * g1)
                    d2, d3 = E_c * c_old * g2 * (1 - g2), E_h * tanh_c * g3 * (1 - g3)
                    D_c += E_c * g2
                    highest = tl.maximum(tl.maximum(tl.abs(d0), tl.abs(d1)), tl.maximum(tl.abs(d2), tl.abs(d3)))
                    tl.store(d_now + pre_at, d0, mask=inside)
                    tl.store(d_now + pre_at + 3 * W, d3, mask=inside)
                else:
                    d1, d2 = E_h * (h_old - g2) * g1 * (1 - g1), E_h * (1 - g1) * (1 - g2 * g2)
                    D_h += E_h * g1
                    highest = tl.abs(d2)
                    tl.store(reset_now + at, g0 * h_old, mask=inside)
                tl.store(d_now + pre_at + W, d1, mask=inside)
                tl.store(d_now + pre_at + 2 * W, d2, mask=inside)
                largest = tl.maximum(largest, tl.max(highest, axis=1))
                if not RESIDENT:
                    tl.store(dh_now + at, D_h, mask=inside)
                    if LSTM:
                        tl.store(dc_now + at, D_c, mask=inside)
            scale, back = inverse(largest)
            if RESIDENT:
                r, h_was = g0, h_old
                if step + 1 < T:  # read ahead, while the products run
                    a0, a1, a2, a3, a_u, h_old, c_old = recall(
                        pre - B * X * W, h - B * W, c - B * W, row, n, in_batch, X, W, LSTM
                    )
                if LSTM:
                    total = dot(d0 * scale[:, None], w0) + dot(d1 * scale[:, None], w1)
                    total += dot(d2 * scale[:, None], w2) + dot(d3 * scale[:, None], w3)
                else:
                    d_rh = dot(d2 * scale[:, None], w2) * back[:, None]
                    d0 = d_rh * h_was * r * (1 - r)
                    D_h += d_rh * r
                    scale, back = inverse(tl.max(tl.maximum(tl.abs(d0), tl.abs(d1)), axis=1))
                    total = dot(d0 * scale[:, None], w0) + dot(d1 * scale[:, None], w1)
                D_h += total * back[:, None]
                if not LSTM:
                    tl.store(d_now + row[:, None] * (X * W) + n[None, :], d0, mask=in_batch[:, None] & (n < W)[None, :])
            else:
                tl.debug_barrier()
                if not LSTM:
                    largest = one * 0
                    for start in range(0, stop, BLOCK):
                        col = start + n
                        inside = in_batch[:, None] & (col < W)[None, :]
                        at, pre_at = row[:, None] * W + col[None, :], row[:, None] * (X * W) + col[None, :]
                        d_rh = product(
                            d_now + 2 * W, scale, w + 2 * W * W, row, col, X * W, in_batch, stop, W, BLOCK, True
                        )
                        d_rh *= back[:, None]
                        r = tl.sigmoid(block(pre_now, row, col, X * W, inside))
                        d0 = d_rh * block(h_now, row, col, W, inside) * r * (1 - r)
                        tl.store(d_now + pre_at, d0, mask=inside)
                        tl.store(dh_now + at, tl.load(dh_now + at, mask=inside, other=0) + d_rh * r, mask=inside)
                        highest = tl.maximum(tl.abs(d0), tl.abs(block(d_now + W, row, col, X * W, inside)))
                        largest = tl.maximum(largest, tl.max(highest, axis=1))
                    scale_c, back_c = scale, back  # of the candidate's pre-activations
                    scale, back = inverse(largest)
                    tl.debug_barrier()
                for start in range(0, stop, BLOCK):
                    col = start + n
                    inside = in_batch[:, None] & (col < W)[None, :]
                    at = row[:, None] * W + col[None, :]
                    total = tl.zeros((TILE, BLOCK), one.dtype)
                    lower = tl.zeros((TILE, BLOCK), one.dtype)
                    for g in tl.static_range(G):
                        if LSTM or g < 2:
                            total += product(
                                d_now + g * W, scale, w + g * W * W, row, col, X * W, in_batch, stop, W, BLOCK, True
                            )
                            if layer > 0:
                                lower += product(
                                    d_now + g * W,
                                    scale,
                                    w_below + g * W * W,
                                    row,
                                    col,
                                    X * W,
                                    in_batch,
                                    stop,
                                    W,
                                    BLOCK,
                                    True,
                                )
                    lower *= back[:, None]
                    if layer > 0:
                        if not LSTM:
                            lower += back_c[:, None] * product(
                                d_now + 2 * W,
                                scale_c,
                                w_below + 2 * W * W,
                                row,
                                col,
                                X * W,
                                in_batch,
                                stop,
                                W,
                                BLOCK,
                                True,
                            )
                        tl.store(d_below + at, lower, mask=inside)
                    D_h = tl.load(dh_now + at, mask=inside, other=0) + total * back[:, None]
                    tl.store(dh_now + at, D_h, mask=inside)
                tl.debug_barrier()
        if POLICY == "skip":
            q = tl.load(gate + row, mask=in_batch, other=0)
            s = tl.load(gate + T * B + row, mask=in_batch, other=0)
            du = worth + Q * (proposed - q) - S * (s + tl.minimum(q, 1 - s))
            if d_updates is not None:
                du += tl.load(d_updates + decision, mask=in_batch, other=0)
            share = tl.where(q < 1 - s, 1.0, tl.where(q == 1 - s, 0.5, 0.0))
            da = (du + tl.where(u_row, 0, S)) * share
            Q = tl.where(valid, tl.where(u_row, 0, Q) + da, Q)
            S = tl.where(valid, da, S)
            gate -= B
            d_logit -= B
        out_row -= H
        decision -= H if NEURONS else 1
        pre -= B * X * W
        d_pre -= B * X * W
        reset -= B * W
        h -= B * W
        c -= B * W
    if POLICY == "skip":
        tl.store(d_gate + run * 2 * B + row, Q, mask=in_batch)
        tl.store(d_gate + run * 2 * B + B + row, S, mask=in_batch)
    if RESIDENT:
        tl.store(d_h + row[:, None] * W + n[None, :], D_h, mask=in_batch[:, None] & (n < W)[None, :])
        tl.store(d_c + row[:, None] * W + n[None, :], D_c, mask=in_batch[:, None] & (n < W)[None, :])

"""The policies' equations: who updates, and the gradient of that decision. q, s: Skip's gate; Q, S: their gradients."""

import triton
import triton.language as tl


@triton.jit
def accumulated(q, s):
    """What Skip rounds."""
    return s + tl.minimum(q, 1 - s)


@triton.jit
def decide(draw, t, T, tile, valid, q, s, POLICY: tl.constexpr):
    """Which sequences update, (TILE,): all, where neurons decide."""
    u = valid
    if POLICY == "random_steps":
        u = u & (tl.load(draw + tile.entry * T + t, mask=tile.exists, other=0) > 0.5)
    if POLICY == "skip":
        u = u & (accumulated(q, s) > 0.5)
    return u


@triton.jit
def decide_neurons(u, draw, neuron, counts, a, slope, POLICY: tl.constexpr):
    """Which neurons of the sequences `u` update, (TILE, BLOCK); neuron: where in `draw`, as far as it counts."""
    u = u[:, None] & counts
    if POLICY == "random_neurons":
        u = u & (tl.load(draw + neuron, mask=counts, other=0) > 0.5)
    if POLICY == "selective":
        u = u & (ramp(a, slope) > 0.5)
    return u


@triton.jit
def skip_after(q, s, proposed, u, valid):
    """q and s after a step, from the proposed next q."""
    return tl.where(u, proposed, q), tl.where(u, 0, tl.where(valid, accumulated(q, s), s))


@triton.jit
def skip_backward(Q, S, q, s, proposed, worth, u, valid):
    """Q and S before a step; worth: what updating is, apart from the gate.

    With a = s + min(q, 1 - s):  du = worth + Q (proposed - q) - S a;  da = du + (1 - u) S;
    Q <- (1 - u) Q + da [q < 1 - s],  S <- da [q < 1 - s],  half of each at a tie.
    """
    du = worth + Q * (proposed - q) - S * accumulated(q, s)
    share = tl.where(q < 1 - s, 1.0, tl.where(q == 1 - s, 0.5, 0.0))
    da = (du + tl.where(u, 0, S)) * share
    return tl.where(valid, tl.where(u, 0, Q) + da, Q), tl.where(valid, da, S)


@triton.jit
def ramp(a, slope):
    """What Selective rounds, before it is clamped to [0, 1]."""
    return (a * slope + 1) / 2


@triton.jit
def selective_backward(a, slope, worth, valid):
    """The gradient of the coordinator's pre-activation."""
    value = ramp(a, slope)
    return tl.where((value >= 0) & (value <= 1) & valid[:, None], worth * slope / 2, 0)

"""A time step of a stack of layers, forth and back: the equations that the other GPU engines' kernels compute too.

Shapes: R runs, B batch, I input of a layer, H hidden, K = H + I + 1, X columns of a layer's weight.
A layer's weights are one matrix over [h, x, 1] (R, K, X), whose columns are the cell's gates, H each. Selective's
coordinator is one more block after the gates that read h, where w_u is a diagonal. The GRU's candidate comes last: it
reads [r * h, x, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model.policies import binary, blend, blend_backward

COORDINATOR = {"lstm": 4, "gru": 2}  # the number of its block


class Layer(NamedTuple):
    """One layer's weights."""

    hidden: int
    first: Tensor  # (R, K, X), or without the GRU's candidate: what reads [h, x, 1]
    second: Tensor | None  # (R, K, H): what reads [r * h, x, 1]

    def rows(self, last: int) -> "Layer":
        """Those before the row `last` alone."""
        return Layer(self.hidden, self.first[:, :last], None if self.second is None else self.second[:, :last])


class Step(NamedTuple):
    """What a layer reads and leaves at a step, (R, B, .) each; or at all of them, (R, T, B, .)."""

    read: Tensor  # [h, x, 1]
    reset: Tensor | None  # [r * h, x, 1]; GRU
    c: Tensor | None  # before the step; LSTM
    blocks: Sequence[Tensor] | None  # gates, activated, and the coordinator's pre-activation; None: not kept

    def before(self, hidden: int) -> tuple[Tensor, ...]:
        """The state before the step."""
        h = self.read[..., :hidden]
        return (h,) if self.c is None else (h, self.c)


class Deciding(NamedTuple):
    """What the decision of a step takes besides the state; None where it does not."""

    draw: Tensor | None  # (R, B, 1) or (R, B, H)
    valid: Tensor | None  # (R, B, 1): whether the step counts
    slope: Tensor | None  # (R, 1, 1); Selective
    w_p: Tensor | None  # (R, 1, H); Skip
    b_p: Tensor | None  # (R, 1, 1); Skip


def forward_step(
    cell: str,
    layers: Sequence[Layer],
    gate: Sequence[Tensor],
    steps: Sequence[Step],
    after: Sequence[Sequence[Tensor]],
    deciding: Deciding,
    kept_gate: Sequence[Tensor],
    updates: Tensor | None,
) -> None:
    """One step.

    Args:
        gate: Skip's q and s, (R, B, 1), which become those after the step.
        after: where the state of each layer after the step belongs, entry by entry.
        kept_gate: where q, s and what is proposed as the next q belong, (R, B, 1); Skip, empty: not kept.
        updates: (R, B, 1) or (R, B, H), where u belongs; None: every step updates.
    """
    befores: list[tuple[Tensor, ...]] = []
    candidates: list[tuple[Tensor, ...]] = []
    for layer, step in zip(layers, steps, strict=True):
        if candidates:
            step.read[..., layer.hidden : -1].copy_(candidates[-1][0])
        befores.append(step.before(layer.hidden))
        blocks = _gates(cell, layer, step)
        candidates.append(_candidate(cell, blocks, befores[-1]))
    u = None
    if updates is not None:
        u = torch.ones_like(updates) if deciding.draw is None else deciding.draw
        if deciding.slope is not None:
            u = binary(((blocks[COORDINATOR[cell]] * deciding.slope + 1) / 2).clamp(0, 1))
        if gate:
            u = binary(_accumulated(*gate))
        if deciding.valid is not None:
            u = torch.where(deciding.valid, u, 0)
        if gate:
            _next_gate(gate, u, candidates[-1][-1], deciding, kept_gate)
        updates.copy_(u)
    for candidate, before, entries in zip(candidates, befores, after, strict=True):
        for new, old, into in zip(candidate, before, entries, strict=True):
            into.copy_(new if u is None else blend(u, new, old))


def _gates(cell: str, layer: Layer, step: Step) -> list[Tensor]:
    """The blocks, as the step keeps them; leaves what it keeps."""
    first = torch.bmm(step.read, layer.first).split(layer.hidden, -1)
    if cell == "lstm":
        blocks = [first[0].sigmoid(), first[1].tanh(), first[2].sigmoid(), first[3].sigmoid(), *first[4:]]
    else:
        assert step.reset is not None
        assert layer.second is not None
        r, z = first[0].sigmoid(), first[1].sigmoid()
        read = torch.cat([r * step.read[..., : layer.hidden], step.read[..., layer.hidden :]], -1)
        step.reset.copy_(read)
        blocks = [r, z, *first[2:], torch.bmm(read, layer.second).tanh()]
    for place, block in zip(step.blocks or (), blocks, strict=False):
        place.copy_(block)
    return blocks


def _candidate(cell: str, blocks: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The candidate state."""
    if cell == "lstm":
        i, j, f, o = blocks[:4]
        c = f * before[1] + i * j
        return c.tanh() * o, c
    z, new = blocks[1], blocks[-1]
    return (z * before[0] + (1 - z) * new,)


def _accumulated(q: Tensor, s: Tensor) -> Tensor:
    """What Skip rounds."""
    return s + torch.minimum(q, 1 - s)


def _next_gate(gate: Sequence[Tensor], u: Tensor, top: Tensor, deciding: Deciding, kept: Sequence[Tensor]) -> None:
    """Skip's q and s become those after the step; top: the last entry of the top layer's candidate."""
    assert deciding.w_p is not None
    assert deciding.b_p is not None
    q, s = gate
    proposed = ((top * deciding.w_p).sum(-1, keepdim=True) + deciding.b_p).sigmoid()
    for place, value in zip(kept, (q, s, proposed), strict=False):
        place.copy_(value)
    after = blend(u, proposed, q), blend(u, torch.zeros_like(s), _accumulated(q, s))
    for old, new in zip(gate, after, strict=True):
        old.copy_(new if deciding.valid is None else torch.where(deciding.valid, new, old))


def backward_step(
    cell: str,
    layers: Sequence[Layer],
    d_states: Sequence[Sequence[Tensor]],
    d_gate: Sequence[Tensor],
    steps: Sequence[Step],
    deciding: Deciding,
    kept_gate: Sequence[Tensor],
    u: Tensor | None,
    d_output: Tensor | None,
    d_updates: Tensor | None,
    d_blocks: Sequence[Sequence[Tensor]],
    d_logit: Tensor | None,
) -> None:
    """The way back through it.

    Args:
        layers: the rows of h, and of the layers above the first of x: the gradient of x itself is not of a step.
        d_states, d_gate: of the states and the gate after the step, which become those before it.
        u: as `updates` of forward_step.
        d_output, d_updates: gradients of the step's output (R, B, H) and of u.
        d_blocks: where the gradients of each layer's pre-activations belong, block by block, (R, B, H).
        d_logit: (R, B), where that of what the sigmoid of Skip's proposal takes belongs.
    """
    befores = [step.before(layer.hidden) for layer, step in zip(layers, steps, strict=True)]
    blocks = [step.blocks or () for step in steps]
    candidates = [_candidate(cell, *both) for both in zip(blocks, befores, strict=True)]
    arriving = [list(entries) for entries in d_states]
    if d_output is not None:
        arriving[-1][0] = arriving[-1][0] + d_output
    if u is None:
        d_candidates, d_befores = arriving, [[torch.zeros_like(entry) for entry in entries] for entries in arriving]
    else:
        parted = [[blend_backward(u, entry) for entry in entries] for entries in arriving]
        d_candidates, d_befores = ([[one[part] for one in entries] for entries in parted] for part in (0, 1))
    d_coordinated = []
    if u is not None and (d_gate or deciding.slope is not None):
        d_u = torch.zeros_like(u) if d_updates is None else d_updates
        for entries, candidate, before in zip(arriving, candidates, befores, strict=True):
            for gradient, new, old in zip(entries, candidate, before, strict=True):
                worth = gradient * (new - old)
                d_u = d_u + (worth.sum(-1, keepdim=True) if d_gate else worth)
        if d_gate and d_logit is not None and deciding.w_p is not None:
            of_logit = _gate_backward(d_gate, u, d_u, deciding.valid, kept_gate)
            d_logit.copy_(of_logit.squeeze(-1))
            d_candidates[-1][-1] = d_candidates[-1][-1] + of_logit * deciding.w_p
        if deciding.slope is not None:
            value = (blocks[0][COORDINATOR[cell]] * deciding.slope + 1) / 2
            d_u = d_u if deciding.valid is None else torch.where(deciding.valid, d_u, 0)
            d_coordinated = [torch.where((value >= 0) & (value <= 1), d_u, 0) * deciding.slope / 2]
    back = _lstm_backward if cell == "lstm" else _gru_backward
    for number in reversed(range(len(layers))):
        state = befores[number], candidates[number], d_candidates[number], d_befores[number]
        found, d_befores[number], of_x = back(layers[number], blocks[number], *state, d_coordinated)
        for place, gradient in zip(d_blocks[number], found, strict=True):
            place.copy_(gradient)
        for part in of_x if number else ():
            d_candidates[number - 1][0] = d_candidates[number - 1][0] + part
    for places, gradients in zip(d_states, d_befores, strict=True):
        for place, gradient in zip(places, gradients, strict=True):
            place.copy_(gradient)


Found = tuple[list[Tensor], list[Tensor], list[Tensor]]  # gradients of the blocks, of the old state; summands of x's


def _lstm_backward(layer: Layer, blocks, before, candidate, d_candidate, d_before, d_coordinated) -> Found:
    i, j, f, o = blocks[:4]
    d_h, d_c = d_candidate
    tanh = candidate[1].tanh()
    d_c = d_c + d_h * o * (1 - tanh * tanh)
    found = [d_c * j * i * (1 - i), d_c * i * (1 - j * j), d_c * before[1] * f * (1 - f), d_h * tanh * o * (1 - o)]
    found += d_coordinated
    d_read = torch.bmm(torch.cat(found, -1), layer.first.mT)
    d_old = [d_before[0] + d_read[..., : layer.hidden], d_before[1] + d_c * f]
    return found, d_old, [d_read[..., layer.hidden :]]


def _gru_backward(layer: Layer, blocks, before, candidate, d_candidate, d_before, d_coordinated) -> Found:
    assert layer.second is not None
    r, z, new = blocks[0], blocks[1], blocks[-1]
    (h,), (d_h,) = before, d_candidate
    d_new = d_h * (1 - z) * (1 - new * new)
    d_reset = torch.bmm(d_new, layer.second.mT)
    d_rh = d_reset[..., : layer.hidden]
    found = [d_rh * h * r * (1 - r), d_h * (h - new) * z * (1 - z), *d_coordinated]
    d_read = torch.bmm(torch.cat(found, -1), layer.first.mT)
    d_old = [d_before[0] + d_h * z + d_rh * r + d_read[..., : layer.hidden]]
    return [*found, d_new], d_old, [d_reset[..., layer.hidden :], d_read[..., layer.hidden :]]


def _gate_backward(
    d_gate: Sequence[Tensor], u: Tensor, d_u: Tensor, valid: Tensor | None, kept: Sequence[Tensor]
) -> Tensor:
    """The gradient of what the proposal's sigmoid takes, (R, B, 1); those of q and s become those before the step.

    d_u: of u, apart from the gate.
    """
    q, s, proposed = kept
    room, accumulated = 1 - s, _accumulated(q, s)
    d_q, d_s = (d if valid is None else torch.where(valid, d, 0) for d in d_gate)
    d_u = d_u + d_q * (proposed - q) - d_s * accumulated
    d_u = d_u if valid is None else torch.where(valid, d_u, 0)
    d_proposed, d_old = blend_backward(u, d_q)
    d_accumulated = blend_backward(u, d_s)[1] + d_u
    of_q = (q < room).to(q.dtype) + (q == room).to(q.dtype) / 2  # the smaller one's; half of equal ones'
    before = d_old + d_accumulated * of_q, d_accumulated * of_q
    for place, counts in zip(d_gate, before, strict=True):
        place.copy_(counts if valid is None else counts + torch.where(valid, 0, place))
    return d_proposed * proposed * (1 - proposed)

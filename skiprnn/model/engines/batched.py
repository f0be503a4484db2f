"""The batched engine: plain torch operations step by step, of all runs that share a launch at once; backward by hand.

It runs on any device, and has no shape or branch that depends on data, so that a CUDA graph can record it. A step is
some thirty operations.

Shapes: R runs, B batch, T steps, I input, H hidden of a layer, G gates, K = H + I + 1, X columns of a layer's weight.
A layer's weights are one matrix over [h, x, 1] (R, K, X), whose columns are the cell's gates. Selective's coordinator
is one more block of H columns after the gates that read h, where w_u is a diagonal. The GRU's candidate comes last: it
reads [r * h, x, 1].
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines import runs
from skiprnn.model.engines.call import Call, Result, unknown, valid
from skiprnn.model.engines.operator import KERNELS, WEIGHTS, Arriving, Gradients, Kernels, Outputs, Problem
from skiprnn.model.engines.runs import summed_product
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


class Layer(NamedTuple):
    """One layer's weights."""

    first: Tensor  # (R, K, X), or without the GRU's candidate: what reads [h, x, 1]
    second: Tensor | None  # (R, K, H): what reads [r * h, x, 1]


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


COORDINATOR = {"lstm": 4, "gru": 2}  # the number of its block


def _mix(u: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """As policies.mix: what is not taken counts for nothing."""
    return torch.where(u == 0, old, torch.where(u == 1, new, u * new + (1 - u) * old))


def _parted(u: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a _mix, for what is new and for what is old."""
    return torch.where(u == 0, 0, u * gradient), torch.where(u == 1, 0, (1 - u) * gradient)


def _rounded(value: Tensor) -> Tensor:
    """As policies.straight_through_round."""
    return torch.where(value.isnan(), value, (value > 0.5).to(value.dtype))


def _candidate(cell: str, layer: Layer, step: Step, hidden: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The candidate state, and the coordinator's pre-activation; leaves what the step keeps."""
    first = torch.bmm(step.read, layer.first).split(hidden, -1)
    if cell == "lstm":
        i, j, f, o = first[0].sigmoid(), first[1].tanh(), first[2].sigmoid(), first[3].sigmoid()
        assert step.c is not None
        blocks, c = [i, j, f, o, *first[4:]], f * step.c + i * j
        candidate: tuple[Tensor, ...] = c.tanh() * o, c
    else:
        r, z, h = first[0].sigmoid(), first[1].sigmoid(), step.read[..., :hidden]
        assert step.reset is not None
        assert layer.second is not None
        read = torch.cat([r * h, step.read[..., hidden:]], -1)
        step.reset.copy_(read)
        new = torch.bmm(read, layer.second).tanh()
        blocks, candidate = [r, z, *first[2:], new], (z * h + (1 - z) * new,)
    for place, block in zip(step.blocks or (), blocks, strict=False):
        place.copy_(block)
    return candidate, first[-1] if len(first) > COORDINATOR[cell] else None


def forward_step(
    cell: str,
    policy: str,
    layers: Sequence[Layer],
    steps: Sequence[Step],
    deciding: Deciding,
    gate: Sequence[Tensor],
    after: Sequence[Sequence[Tensor]],
    kept_gate: Sequence[Tensor],
    updates: Tensor,
) -> None:
    """One step of a stack of layers.

    Args:
        gate: Skip's q and s, (R, B, 1), which become those after the step.
        after: where the state of each layer after the step belongs, entry by entry.
        kept_gate: where q, s and what is proposed as the next q belong, (R, B, 1); Skip, empty: not kept.
        updates: (R, B, 1) or (R, B, H), where u belongs, if it can be other than 1.
    """
    befores = [step.before(entries[0].shape[-1]) for step, entries in zip(steps, after, strict=True)]
    candidates: list[tuple[Tensor, ...]] = []
    coordinated = None
    for layer, step, before in zip(layers, steps, befores, strict=True):
        hidden = before[0].shape[-1]
        if candidates:
            step.read[..., hidden:-1].copy_(candidates[-1][0])
        candidate, coordinated = _candidate(cell, layer, step, hidden)
        candidates.append(candidate)
    draw, valid, slope, w_p, b_p = deciding
    u = torch.ones_like(updates) if draw is None else draw
    if slope is not None and coordinated is not None:
        u = _rounded(((coordinated * slope + 1) / 2).clamp(0, 1))
    if gate:
        q, s = gate
        accumulated = s + torch.minimum(q, 1 - s)
        u = _rounded(accumulated)
    if valid is not None:
        u = torch.where(valid, u, 0)
    if gate and w_p is not None and b_p is not None:
        proposed = ((candidates[-1][-1] * w_p).sum(-1, keepdim=True) + b_p).sigmoid()
        for place, value in zip(kept_gate, (q, s, proposed), strict=False):
            place.copy_(value)
        next_gate = _mix(u, proposed, q), _mix(u, torch.zeros_like(s), accumulated)
        for old, new in zip(gate, next_gate, strict=True):
            old.copy_(new if valid is None else torch.where(valid, new, old))
    mixed = policy != "always" or valid is not None
    if mixed:
        updates.copy_(u)
    for candidate, before, entries in zip(candidates, befores, after, strict=True):
        for new, old, into in zip(candidate, before, entries, strict=True):
            into.copy_(_mix(u, new, old) if mixed else new)


def backward_step(
    cell: str,
    policy: str,
    layers: Sequence[Layer],
    steps: Sequence[Step],
    deciding: Deciding,
    kept_gate: Sequence[Tensor],
    u: Tensor,
    d_output: Tensor | None,
    d_updates: Tensor | None,
    d_states: Sequence[Sequence[Tensor]],
    d_gate: Sequence[Tensor],
    d_blocks: Sequence[Sequence[Tensor]],
    d_logit: Tensor | None,
) -> None:
    """The way back through it.

    Args:
        u: as `updates` of forward_step.
        d_output, d_updates: gradients of the step's output (R, B, H) and of u.
        d_states, d_gate: of the states and the gate after the step, which become those before it.
        d_blocks: where the gradients of each layer's pre-activations belong, block by block, (R, B, H).
        d_logit: (R, B), where that of what the sigmoid of Skip's proposal takes belongs.
    """
    _, valid, slope, w_p, _ = deciding
    befores: list[tuple[Tensor, ...]] = []
    blocks: list[Sequence[Tensor]] = []
    candidates: list[tuple[Tensor, ...]] = []
    for step, (d_h, *_) in zip(steps, d_states, strict=True):
        hidden = d_h.shape[-1]
        before = step.before(hidden)
        assert step.blocks is not None
        block = step.blocks
        if cell == "lstm":
            c = block[2] * before[1] + block[0] * block[1]
            candidates.append((c.tanh() * block[3], c))
        else:
            candidates.append((block[1] * before[0] + (1 - block[1]) * block[-1],))
        befores.append(before)
        blocks.append(block)
    arriving = [list(entries) for entries in d_states]
    if d_output is not None:
        arriving[-1][0] = arriving[-1][0] + d_output
    d_u = torch.zeros_like(u) if d_updates is None else d_updates
    for entries, candidate, before in zip(arriving, candidates, befores, strict=True):
        for gradient, new, old in zip(entries, candidate, before, strict=True):
            if d_gate:
                d_u = d_u + (gradient * (new - old)).sum(-1, keepdim=True)
            elif slope is not None:
                d_u = d_u + gradient * (new - old)
    if policy == "always" and valid is None:
        parted = [[(gradient, torch.zeros_like(gradient)) for gradient in entries] for entries in arriving]
    else:
        parted = [[_parted(u, gradient) for gradient in entries] for entries in arriving]
    d_candidates = [[new for new, _ in entries] for entries in parted]
    d_befores = [[old for _, old in entries] for entries in parted]
    if d_gate and d_logit is not None and w_p is not None:
        q, s, proposed = kept_gate
        room = 1 - s
        accumulated = s + torch.minimum(q, room)
        d_q, d_s = d_gate
        counted = [d if valid is None else torch.where(valid, d, 0) for d in d_gate]
        d_u = d_u + counted[0] * (proposed - q) - counted[1] * accumulated
        d_u = d_u if valid is None else torch.where(valid, d_u, 0)
        d_proposed, d_old = _parted(u, counted[0])
        d_accumulated = _parted(u, counted[1])[1] + d_u
        of_logit = d_proposed * proposed * (1 - proposed)
        d_candidates[-1][-1] = d_candidates[-1][-1] + of_logit * w_p
        d_logit.copy_(of_logit.squeeze(-1))
        of_q = (q < room).to(q.dtype) + (q == room).to(q.dtype) / 2  # the smaller one's; half of equal ones'
        before_gate = d_old + d_accumulated * of_q, d_accumulated * of_q
        for place, counts, given in zip(d_gate, before_gate, (d_q, d_s), strict=True):
            place.copy_(counts if valid is None else counts + torch.where(valid, 0, given))
    d_coordinated = []
    if slope is not None:
        value = (blocks[0][COORDINATOR[cell]] * slope + 1) / 2
        d_u = d_u if valid is None else torch.where(valid, d_u, 0)
        d_coordinated = [torch.where((value >= 0) & (value <= 1), d_u, 0) * slope / 2]
    for number in reversed(range(len(layers))):
        layer, block, before, d_before = layers[number], blocks[number], befores[number], d_befores[number]
        d_h = d_candidates[number][0]
        hidden = d_h.shape[-1]
        rows = -1 if number else hidden  # the gradient of x is not of this step
        if cell == "lstm":
            i, j, f, o = block[:4]
            tanh = candidates[number][1].tanh()
            d_c = d_candidates[number][1] + d_h * o * (1 - tanh * tanh)
            d_gates = [d_c * j * i * (1 - i), d_c * i * (1 - j * j), d_c * before[1] * f * (1 - f)]
            found = [*d_gates, d_h * tanh * o * (1 - o), *d_coordinated]
            d_first = torch.cat(found, -1)
            d_before[1] = d_before[1] + d_c * f
            d_read = torch.bmm(d_first, layer.first[:, :rows].mT)
        else:
            assert layer.second is not None
            r, z, new = block[0], block[1], block[-1]
            d_second = d_h * (1 - z) * (1 - new * new)
            d_reset = torch.bmm(d_second, layer.second[:, :rows].mT)
            d_r, below = d_reset[..., :hidden], d_reset[..., hidden:]
            d_gates = [d_r * before[0] * r * (1 - r), d_h * (before[0] - new) * z * (1 - z)]
            found = [*d_gates, *d_coordinated, d_second]
            d_first = torch.cat(found[:-1], -1)
            d_before[0] = d_before[0] + d_h * z + d_r * r
            d_read = torch.bmm(d_first, layer.first[:, :rows].mT)
            if number:
                d_candidates[number - 1][0] = d_candidates[number - 1][0] + below
        for place, gradient in zip(d_blocks[number], found, strict=True):
            place.copy_(gradient)
        d_before[0] = d_before[0] + d_read[..., :hidden]
        if number:
            d_candidates[number - 1][0] = d_candidates[number - 1][0] + d_read[..., hidden:]
    for places, gradients in zip(d_states, d_befores, strict=True):
        for place, gradient in zip(places, gradients, strict=True):
            place.copy_(gradient)


class _Loop:
    """Sizes of a problem, its weights as the steps read them, and views of what is kept of its sequences."""

    def __init__(self, problem: Problem):
        self.problem, self.cell = problem, problem.cell
        self.runs, self.batch, self.steps, self.inputs = problem.x.shape
        self.hidden, self.entries = problem.hidden, problem.entries
        self.below = [self.inputs, *self.hidden[:-1]]
        self.count = problem.blocks

    def layers(self) -> list[Layer]:
        """The weights."""
        return [self._layer(number) for number in range(len(self.hidden))]

    def _layer(self, number: int) -> Layer:
        of_x, of_h, bias = self.problem.weights[WEIGHTS * number : WEIGHTS * (number + 1)]
        blocks = list(torch.cat([of_h.mT, of_x.mT, bias.unsqueeze(1)], 1).split(self.hidden[number], -1))
        if self.count > self.problem.gates:
            gate_x, gate_h, gate_bias, _ = self.problem.policy_weights
            coordinator = torch.cat([gate_h.diag_embed(), gate_x.mT, gate_bias.unsqueeze(1)], 1)
            blocks.insert(COORDINATOR[self.cell], coordinator)
        if self.cell == "lstm":
            return Layer(torch.cat(blocks, -1), None)
        return Layer(torch.cat(blocks[:-1], -1), blocks[-1].contiguous())

    def widths(self, number: int) -> list[int]:
        """Columns of a layer's Step, entry by entry; 0 for None."""
        hidden = self.hidden[number]
        read, lstm = hidden + self.below[number] + 1, self.cell == "lstm"
        return [read, 0 if lstm else read, hidden if lstm else 0, self.count * hidden]

    def saved(self) -> int:
        """Elements of all that backward needs: of each layer at each step, and the top layer's last state."""
        columns = sum(sum(self.widths(number)) for number in range(len(self.hidden)))
        return self.runs * self.batch * (self.steps * columns + self.hidden[-1])

    def views(self, saved: Tensor) -> tuple[list[Step], Tensor]:
        """Each layer's Step of whole sequences and the top layer's last state (R, B, H), in the one tensor `saved`; if
        that is empty, in memory of their own, and without what only backward needs."""
        save = bool(saved.numel())
        found, start = [], 0

        def take(*shape: int) -> Tensor:
            """The next elements."""
            nonlocal start
            if not save:
                return saved.new_empty(shape)
            start += (size := math.prod(shape))
            return saved[start - size : start].view(shape)

        for number in range(len(self.hidden)):
            rows = self.runs, self.steps, self.batch
            read, reset, c, blocks = self.widths(number)
            found.append(
                Step(
                    take(*rows, read),
                    take(*rows, reset) if reset else None,
                    take(*rows, c) if c else None,
                    take(*rows, blocks).split(self.hidden[number], -1) if save else None,
                )
            )
        return found, take(self.runs, self.batch, self.hidden[-1])

    def steps_of(self, whole: Sequence[Step]) -> list[list[Step]]:
        """For every step, each layer's."""
        layers = []
        for step in whole:
            reset, c = (_unbind(part, 1, self.steps) for part in (step.reset, step.c))
            blocks = [None] * self.steps if step.blocks is None else by_step(step.blocks)
            layers.append([Step(*parts) for parts in zip(step.read.unbind(1), reset, c, blocks, strict=True)])
        return [list(each) for each in zip(*layers, strict=True)]

    def deciding(self) -> list[Deciding]:
        """Of every step."""
        problem, counting = self.problem, None
        draw = problem.draw if problem.draw is None or problem.by_neuron else problem.draw.unsqueeze(3)
        if problem.lengths is not None:
            counting = valid(problem.lengths, self.steps).unsqueeze(3)
        slope = w_p = b_p = None
        if problem.policy == "selective":
            slope = problem.policy_weights[3].view(-1, 1, 1)
        if problem.policy == "skip":
            w_p, b_p = problem.policy_weights[0].unsqueeze(1), problem.policy_weights[1].view(-1, 1, 1)
        each = zip(_unbind(draw, 2, self.steps), _unbind(counting, 2, self.steps), strict=True)
        return [Deciding(one, alive, slope, w_p, b_p) for one, alive in each]

    def gates(self, saved_gate: Tensor) -> list[Sequence[Tensor]]:
        """For every step, the parts of Skip's kept gate (R, T, 3, B), (R, B, 1) each; none if it is empty."""
        if not saved_gate.numel():
            return [()] * self.steps
        return by_step(saved_gate.unsqueeze(4).unbind(2))

    def decisions(self, updates: Tensor) -> Tensor:
        """Updates as (R, B, T, 1) or (R, B, T, H)."""
        return updates if self.problem.by_neuron else updates.unsqueeze(3)


def _unbind(tensor: Tensor | None, dimension: int, count: int) -> Sequence[Tensor | None]:
    return [None] * count if tensor is None else tensor.unbind(dimension)


def by_step(parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """For every step, each part of a whole sequence (R, T, ...)."""
    return list(zip(*(part.unbind(1) for part in parts), strict=True))


@contextmanager
def _precision(x: Tensor) -> Iterator[None]:
    """Within, products on a GPU have the precision that torch.nn.LSTM's have."""
    matmul = torch.backends.cuda.matmul
    if x.device.type != "cuda":
        yield
        return
    before = matmul.fp32_precision
    exact = torch.backends.cudnn.rnn.fp32_precision == "ieee"  # type: ignore[attr-defined]
    matmul.fp32_precision = "ieee" if exact else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def kept(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """The layers' Steps, and Skip's gate."""
    return runs.kept(problem, save, _Loop(problem).saved())


def forward(problem: Problem, save: bool) -> Outputs:
    """skiprnn::recurrence of R runs at once."""
    x, loop = problem.x, _Loop(problem)
    outputs = Outputs.empty(problem, save)
    output, updates = outputs.output, outputs.updates
    whole, last = loop.views(outputs.saved)
    for number, (layer, hidden) in enumerate(zip(whole, loop.hidden, strict=True)):
        layer.read[..., -1] = 1
        if number == 0:
            layer.read[..., hidden:-1] = x.transpose(1, 2)
        for place, given in zip(layer.before(hidden), problem.states[loop.entries * number :], strict=False):
            place[:, 0] = given
    final = [[x.new_empty(loop.runs, loop.batch, hidden) for _ in range(loop.entries)] for hidden in loop.hidden]
    gate = [part.unsqueeze(2).expand(-1, loop.batch, 1).clone() for part in problem.gate]
    steps, layers = loop.steps_of(whole), loop.layers()
    places = [[one.before(hidden) for one, hidden in zip(now, loop.hidden, strict=True)] for now in steps[1:]]
    kept_gates = loop.gates(outputs.saved_gate)
    if problem.policy == "always" and problem.lengths is None:
        updates.fill_(1)
    decided, deciding = loop.decisions(updates).unbind(2), loop.deciding()
    with _precision(x):
        for t, now in enumerate(steps):
            after = places[t] if t < len(places) else final
            forward_step(problem.cell, problem.policy, layers, now, deciding[t], gate, after, kept_gates[t], decided[t])
    if gate:
        outputs.final_gate.copy_(torch.cat(gate, 2).transpose(1, 2))
    last.copy_(final[-1][-1])
    output[:, :, :-1] = whole[-1].read[:, 1:, :, : loop.hidden[-1]].transpose(1, 2)
    output[:, :, -1] = final[-1][0]
    return outputs._replace(final=torch.cat([entry.flatten(1) for entries in final for entry in entries], 1))


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """skiprnn::recurrence_backward of R runs at once."""
    x, loop = problem.x, _Loop(problem)
    whole, last = loop.views(outputs.saved)
    rows = loop.runs, loop.batch
    d_states = [[x.new_zeros(*rows, hidden) for _ in range(loop.entries)] for hidden in loop.hidden]
    if arriving.final is not None:
        places = [place for entries in d_states for place in entries]
        for place, given in zip(places, problem.split(arriving.final), strict=True):
            place.copy_(given)
    d_gate = [x.new_zeros(*rows, 1) for _ in problem.gate]
    if arriving.final_gate is not None:
        for place, given in zip(d_gate, arriving.final_gate.unbind(1), strict=False):
            place.copy_(given.unsqueeze(2))
    d_blocks = [x.new_empty(loop.runs, loop.steps, loop.batch, loop.count * hidden) for hidden in loop.hidden]
    d_logit = x.new_empty(loop.runs, loop.steps, loop.batch) if d_gate else None
    d_parts = [part.split(hidden, -1) for part, hidden in zip(d_blocks, loop.hidden, strict=True)]
    d_updates = None if arriving.updates is None else loop.decisions(arriving.updates)
    layers = loop.layers()
    each = zip(
        loop.steps_of(whole),
        loop.deciding(),
        loop.gates(outputs.saved_gate),
        loop.decisions(outputs.updates).unbind(2),
        _unbind(arriving.output, 2, loop.steps),
        _unbind(d_updates, 2, loop.steps),
        zip(*(by_step(parts) for parts in d_parts), strict=True),
        _unbind(d_logit, 1, loop.steps),
        strict=True,
    )
    with _precision(x):
        for now, deciding, kept_gate, u, d_output, d_u, d_block, logit in reversed(list(each)):
            backward_step(
                problem.cell,
                problem.policy,
                layers,
                now,
                deciding,
                kept_gate,
                u,
                d_output,
                d_u,
                d_states,
                d_gate,
                d_block,
                logit,
            )
        products = [_of_weights(loop, layer, d) for layer, d in zip(whole, d_blocks, strict=True)]
        d_x = x.new_empty(0)
        if needs_input:
            weight = torch.cat([part for part in layers[0] if part is not None], -1)
            d_x = runs.of_input(d_blocks[0], weight[:, loop.hidden[0] : -1].mT)
    found: list[Tensor] = [entry for entries in d_states for entry in entries]
    coordinator = x.new_empty(0)
    for product, hidden in zip(products, loop.hidden, strict=True):
        blocks = list(product.split(hidden, -1))
        if len(blocks) > problem.gates:
            coordinator = blocks.pop(COORDINATOR[problem.cell])
        whole_weight = torch.cat(blocks, -1).mT
        found += [whole_weight[..., hidden:-1], whole_weight[..., :hidden], whole_weight[..., -1]]
    found += [part.squeeze(2) for part in d_gate]
    if d_logit is not None:
        states = whole[-1].before(loop.hidden[-1])[-1]
        of_w = torch.einsum("rtb,rtbh->rh", d_logit[:, :-1], states[:, 1:])
        found += [of_w + torch.einsum("rb,rbh->rh", d_logit[:, -1], last), d_logit.sum((1, 2))]
    if coordinator.numel():
        of_h, of_x, bias = coordinator.split([loop.hidden[0], loop.inputs, 1], 1)
        found += [of_x.mT, of_h.diagonal(dim1=1, dim2=2), bias.squeeze(1), torch.zeros_like(problem.policy_weights[3])]
    return Gradients.of([d_x, *found], problem)


def _of_weights(loop: _Loop, step: Step, d_blocks: Tensor) -> Tensor:
    """The gradient of a layer's weights (R, K, X): products over all steps and sequences."""
    if step.reset is None:
        return summed_product(step.read, d_blocks)
    candidate = d_blocks.shape[-1] // loop.count
    first, second = d_blocks.split([d_blocks.shape[-1] - candidate, candidate], -1)
    return torch.cat([summed_product(step.read, first), summed_product(step.reset, second)], -1)


KERNELS["batched"] = Kernels(kept, forward, backward)

"""skiprnn::recurrence step by step: where the steps read and write, the products after the time loop.

Shapes as in steps.py, and T steps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from skiprnn.model.engines.batched.steps import COORDINATOR, Deciding, Layer, Step, backward_step, forward_step
from skiprnn.model.engines.call import valid
from skiprnn.model.engines.operator import KERNELS, WEIGHTS, Arriving, Gradients, Kernels, Outputs, Problem
from skiprnn.model.engines.runs import kept_shapes, of_input, summed_product


class _Loop:
    """Sizes of a problem, its weights as the steps read them, and views of what is kept of its sequences."""

    def __init__(self, problem: Problem):
        self.problem, self.cell = problem, problem.cell
        self.runs, self.batch, self.steps, self.inputs = problem.x.shape
        self.hidden, self.entries = problem.hidden, problem.entries
        self.below = [self.inputs, *self.hidden[:-1]]
        self.rows = self.runs, self.steps, self.batch

    def layers(self) -> list[Layer]:
        """The weights."""
        return [self._layer(number) for number in range(len(self.hidden))]

    def _layer(self, number: int) -> Layer:
        of_x, of_h, bias = self.problem.weights[WEIGHTS * number : WEIGHTS * (number + 1)]
        blocks = list(torch.cat([of_h.mT, of_x.mT, bias.unsqueeze(1)], 1).split(self.hidden[number], -1))
        if self.problem.policy == "selective":
            gate_x, gate_h, gate_bias, _ = self.problem.policy_weights
            coordinator = torch.cat([gate_h.diag_embed(), gate_x.mT, gate_bias.unsqueeze(1)], 1)
            blocks.insert(COORDINATOR[self.cell], coordinator)
        if self.cell == "lstm":
            return Layer(self.hidden[number], torch.cat(blocks, -1), None)
        return Layer(self.hidden[number], torch.cat(blocks[:-1], -1), blocks[-1].contiguous())

    def widths(self, number: int) -> list[int]:
        """Columns of a layer's Step, entry by entry; 0 for None."""
        hidden = self.hidden[number]
        read, lstm = hidden + self.below[number] + 1, self.cell == "lstm"
        return [read, 0 if lstm else read, hidden if lstm else 0, self.problem.blocks * hidden]

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

        for number, hidden in enumerate(self.hidden):
            read, reset, c, blocks = self.widths(number)
            found.append(
                Step(
                    take(*self.rows, read),
                    take(*self.rows, reset) if reset else None,
                    take(*self.rows, c) if c else None,
                    take(*self.rows, blocks).split(hidden, -1) if save else None,
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

    def decisions(self, updates: Tensor) -> Sequence[Tensor | None]:
        """Of every step, (R, B, 1) or (R, B, H); None where every step updates."""
        if self.problem.policy == "always" and self.problem.lengths is None:
            return [None] * self.steps
        return self.by_row(updates).unbind(2)

    def by_row(self, updates: Tensor) -> Tensor:
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
    return kept_shapes(problem, save, _Loop(problem).saved())


def forward(problem: Problem, save: bool) -> Outputs:
    """skiprnn::recurrence of R runs at once."""
    x, loop = problem.x, _Loop(problem)
    outputs = Outputs.empty(problem, save)
    if problem.policy == "always":
        outputs.updates.fill_(1)
    whole, last = loop.views(outputs.saved)
    for number, (layer, hidden) in enumerate(zip(whole, loop.hidden, strict=True)):
        layer.read[..., -1] = 1
        if number == 0:
            layer.read[..., hidden:-1] = x.transpose(1, 2)
        for place, given in zip(layer.before(hidden), problem.states[loop.entries * number :], strict=False):
            place[:, 0] = given
    final = [[x.new_empty(loop.runs, loop.batch, hidden) for _ in range(loop.entries)] for hidden in loop.hidden]
    gate = [part.unsqueeze(2).clone() for part in problem.gate]
    steps, layers = loop.steps_of(whole), loop.layers()
    after: list = [[one.before(hidden) for one, hidden in zip(now, loop.hidden, strict=True)] for now in steps[1:]]
    decisions = loop.decisions(outputs.updates)
    moments = zip(steps, [*after, final], loop.deciding(), loop.gates(outputs.saved_gate), decisions, strict=True)
    with _precision(x):
        for moment in moments:
            forward_step(problem.cell, layers, gate, *moment)
    if gate:
        outputs.final_gate.copy_(torch.cat(gate, 2).transpose(1, 2))
    last.copy_(final[-1][-1])
    outputs.output[:, :, :-1] = whole[-1].read[:, 1:, :, : loop.hidden[-1]].transpose(1, 2)
    outputs.output[:, :, -1] = final[-1][0]
    return outputs._replace(final=torch.cat([entry.flatten(1) for entries in final for entry in entries], 1))


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """skiprnn::recurrence_backward of R runs at once."""
    x, loop = problem.x, _Loop(problem)
    whole, last = loop.views(outputs.saved)
    d_states = [[x.new_zeros(loop.runs, loop.batch, hidden) for _ in range(loop.entries)] for hidden in loop.hidden]
    flat_d_states = [entry for entries in d_states for entry in entries]
    if arriving.final is not None:
        for place, given in zip(flat_d_states, problem.split(arriving.final), strict=True):
            place.copy_(given)
    d_gate = [x.new_zeros(loop.runs, loop.batch, 1) for _ in problem.gate]
    if arriving.final_gate is not None:
        for place, given in zip(d_gate, arriving.final_gate.unbind(1), strict=False):
            place.copy_(given.unsqueeze(2))
    d_blocks = [x.new_empty(*loop.rows, problem.blocks * hidden) for hidden in loop.hidden]
    d_parts = [part.split(hidden, -1) for part, hidden in zip(d_blocks, loop.hidden, strict=True)]
    d_logit = x.new_empty(loop.rows) if d_gate else None
    d_updates = None if arriving.updates is None else loop.by_row(arriving.updates)
    layers = loop.layers()
    moments = zip(
        loop.steps_of(whole),
        loop.deciding(),
        loop.gates(outputs.saved_gate),
        loop.decisions(outputs.updates),
        _unbind(arriving.output, 2, loop.steps),
        _unbind(d_updates, 2, loop.steps),
        zip(*(by_step(parts) for parts in d_parts), strict=True),
        _unbind(d_logit, 1, loop.steps),
        strict=True,
    )
    with _precision(x):
        read = [layers[0].rows(loop.hidden[0]), *(layer.rows(-1) for layer in layers[1:])]
        for moment in reversed(list(moments)):
            backward_step(problem.cell, read, d_states, d_gate, *moment)
        products = [_of_weights(*both) for both in zip(whole, d_blocks, loop.hidden, strict=True)]
        d_x = x.new_empty(0)
        if needs_input:
            weight = torch.cat([part for part in layers[0][1:] if part is not None], -1)
            d_x = of_input(d_blocks[0], weight[:, loop.hidden[0] : -1].mT)
    found = [*flat_d_states]
    coordinator: list[Tensor] = []
    for product, hidden in zip(products, loop.hidden, strict=True):
        blocks = list(product.split(hidden, -1))
        if problem.policy == "selective":
            of_h, of_x, bias = blocks.pop(COORDINATOR[problem.cell]).split([hidden, loop.inputs, 1], 1)
            of_slope = torch.zeros_like(problem.policy_weights[3])
            coordinator = [of_x.mT, of_h.diagonal(dim1=1, dim2=2), bias.squeeze(1), of_slope]
        of_gates = torch.cat(blocks, -1).mT
        found += [of_gates[..., hidden:-1], of_gates[..., :hidden], of_gates[..., -1]]
    found += [*(part.squeeze(2) for part in d_gate), *coordinator]
    if d_logit is not None:
        states = whole[-1].before(loop.hidden[-1])[-1]
        of_w = torch.einsum("rtb,rtbh->rh", d_logit[:, :-1], states[:, 1:])
        found += [of_w + torch.einsum("rb,rbh->rh", d_logit[:, -1], last), d_logit.sum((1, 2))]
    return Gradients.of([d_x, *found], problem)


def _of_weights(step: Step, d_blocks: Tensor, hidden: int) -> Tensor:
    """The gradient of a layer's weights (R, K, X): products over all steps and sequences."""
    if step.reset is None:
        return summed_product(step.read, d_blocks)
    first = summed_product(step.read, d_blocks[..., :-hidden])
    return torch.cat([first, summed_product(step.reset, d_blocks[..., -hidden:])], -1)


KERNELS["batched"] = Kernels(kept, forward, backward)

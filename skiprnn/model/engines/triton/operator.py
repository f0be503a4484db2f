"""skiprnn::recurrence on a GPU: what the kernels read and write, the products before and after the time loop.

Every tensor has a leading dimension R, the runs that share a launch. Other shapes: see kernels.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from skiprnn.model.engines.operator import KERNELS, WEIGHTS, Arriving, Gradients, Kernels, Outputs, Problem
from skiprnn.model.engines.triton import kernels

TILE = 16  # rows of a program: the least that a matrix instruction takes
BLOCK = 32  # columns of a state that are computed at once, where states and weights pass through memory
ON_CHIP = 128 << 10  # bytes of weights that a program keeps in its registers
FEW_INPUTS = 4  # so many are multiplied within the time loop; more, in one product before it


def operands(dtype: torch.dtype) -> torch.dtype:
    """What the recurrent products multiply, by the setting that torch.nn.LSTM obeys.

    fp16 has tf32's mantissa, states and weights fit its range, gradients are scaled into it.
    """
    tf32 = dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "ieee"  # type: ignore[attr-defined]
    return torch.float16 if tf32 else dtype


class _Sizes:
    """Sizes of a call, and what the kernels are compiled for."""

    def __init__(self, problem: Problem):
        self.gates, self.entries, self.hidden = problem.gates, problem.entries, problem.hidden
        self.runs, self.batch, self.steps, self.inputs = problem.x.shape
        self.layers, self.width = len(self.hidden), triton.cdiv(max(self.hidden), TILE) * TILE
        self.columns = self.gates + (problem.policy == "selective")
        block = triton.next_power_of_2(self.width)
        resident = self.layers == 1 and self.gates * block**2 * operands(problem.x.dtype).itemsize <= ON_CHIP
        self.options: dict[str, Any] = {
            "LSTM": problem.cell == "lstm",
            "POLICY": problem.policy,
            "H": self.hidden[-1],
            "W": self.width,
            "L": self.layers,
            "TILE": TILE,
            "BLOCK": block if resident else min(BLOCK, block),
            "RESIDENT": resident,
            "num_warps": 8 if resident else 4,
            "num_stages": 1,
        }
        self.grid = (triton.cdiv(self.batch, TILE), self.runs)
        rows = (self.runs, self.layers, self.steps, self.batch)
        self.states = (self.runs, self.layers, self.steps + 1, self.batch, self.width)
        self.pre = (*rows, self.columns, self.width)
        self.reset = (*rows, self.width)

    def saved(self) -> int:
        """Elements of all that backward needs."""
        return torch.Size(self.states).numel() * self.entries + torch.Size(self.pre).numel()

    def split(self, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, c (a copy of h if the cell has none) and pre in the one tensor `saved`."""
        size = torch.Size(self.states).numel()
        *states, pre = saved.split([size] * self.entries + [torch.Size(self.pre).numel()])
        return states[0].view(self.states), states[-1].view(self.states), pre.view(self.pre)


def shapes(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """The outputs' shapes."""
    sizes = _Sizes(problem)
    rows = problem.x.shape[:3]
    skip = problem.policy == "skip"
    return [
        (*rows, sizes.hidden[-1]),
        (sizes.runs, sizes.batch * sizes.entries * sum(sizes.hidden)),
        (sizes.runs, 2, sizes.batch) if skip else (0,),
        (*rows, sizes.hidden[-1]) if problem.by_neuron else tuple(rows),
        (sizes.saved() if save else 0,),
        (sizes.runs, 3, sizes.steps, sizes.batch) if skip and save else (0,),
        (0,),
    ]


def _recurrent_weights(sizes: _Sizes, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight (R, L, G, W, W) and input_weight of the upper layers, [.., in, out], in the operands' type."""
    shape = sizes.runs, sizes.layers, sizes.gates, sizes.width, sizes.width
    weight = weights[0].new_zeros(shape, dtype=dtype)
    below = weights[0].new_zeros((sizes.runs, max(sizes.layers - 1, 1), *shape[2:]), dtype=dtype)
    for layer, hidden in enumerate(sizes.hidden):
        of_input, of_state, _ = weights[WEIGHTS * layer : WEIGHTS * (layer + 1)]
        blocks = of_state.view(sizes.runs, sizes.gates, hidden, hidden)
        weight[:, layer, :, :hidden, :hidden] = blocks.transpose(2, 3)
        if layer:
            inputs = sizes.hidden[layer - 1]
            blocks = of_input.view(sizes.runs, sizes.gates, hidden, inputs)
            below[:, layer - 1, :, :inputs, :hidden] = blocks.transpose(2, 3)
    return weight, below


def _input_weights(sizes: _Sizes, policy: str, weights, policy_weights) -> tuple[Tensor, Tensor]:
    """x_weight (R, I, X, W) of the first layer and bias (R, L, X, W) of all."""
    first = sizes.hidden[0]
    x_weight = weights[0].new_zeros(sizes.runs, sizes.inputs, sizes.columns, sizes.width)
    bias = weights[0].new_zeros(sizes.runs, sizes.layers, sizes.columns, sizes.width)
    blocks = weights[0].view(sizes.runs, sizes.gates, first, sizes.inputs)
    x_weight[:, :, : sizes.gates, :first] = blocks.permute(0, 3, 1, 2)
    for layer, hidden in enumerate(sizes.hidden):
        blocks = weights[WEIGHTS * layer + 2].view(sizes.runs, sizes.gates, hidden)
        bias[:, layer, : sizes.gates, :hidden] = blocks
    if policy == "selective":
        x_weight[:, :, sizes.gates, :first] = policy_weights[0].transpose(1, 2)
        bias[:, 0, sizes.gates, :first] = policy_weights[2]
    return x_weight, bias


def _widened(parts: Sequence[Tensor], sizes: _Sizes, into: Tensor) -> Tensor:
    """One tensor (R, B, H) per layer -> into (R, L, B, W)."""
    for layer, part in enumerate(parts):
        into[:, layer, :, : part.shape[-1]] = part
    return into


def _policy_arguments(sizes: _Sizes, policy: str, policy_weights) -> tuple[Tensor | None, ...]:
    """w_p (R, W), b_p, w_u (R, W), slope, None where the policy has none."""
    more = sizes.width - sizes.hidden[-1]
    if policy == "skip":
        return torch.nn.functional.pad(policy_weights[0], (0, more)), policy_weights[1].contiguous(), None, None
    if policy == "selective":
        return None, None, torch.nn.functional.pad(policy_weights[1], (0, more)), policy_weights[3].contiguous()
    return None, None, None, None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(problem: Problem, save: bool) -> Outputs:
    """skiprnn::recurrence of R runs at once."""
    _, _, policy, x, states, weights, gate, policy_weights, draw, lengths = problem
    sizes, expected = _Sizes(problem), shapes(problem, save)
    output, _, last_gate, updates, saved, saved_gate, projected = (x.new_empty(shape) for shape in expected)
    weight, input_weight = _recurrent_weights(sizes, weights, operands(x.dtype))
    x_weight, bias = _input_weights(sizes, policy, weights, policy_weights)
    few = sizes.inputs <= FEW_INPUTS
    slots = sizes.steps + 1
    if save:
        h, c, pre = sizes.split(saved)
    else:
        slots = 1 if sizes.options["RESIDENT"] else slots
        h, c = x.new_empty(2, sizes.runs, sizes.layers, slots, sizes.batch, sizes.width)
        pre = x.new_empty(0 if few else sizes.pre)
    if not few:
        rows = x.transpose(1, 2).reshape(sizes.runs, -1, sizes.inputs)
        product = torch.baddbmm(bias[:, 0].flatten(1).unsqueeze(1), rows, x_weight.flatten(2))
        pre[:, 0] = product.view(pre[:, 0].shape)
    for entry, buffer in zip(range(sizes.entries), (h, c), strict=False):
        _widened(states[entry :: sizes.entries], sizes, buffer[:, :, 0].zero_())
    if policy == "skip":
        last_gate.copy_(torch.stack(list(gate), 1))
    w_p, b_p, w_u, slope = _policy_arguments(sizes, policy, policy_weights)
    alone = sizes.options["RESIDENT"]
    scratch = x.new_empty(0 if alone else (sizes.layers + 1) * sizes.runs * sizes.batch * sizes.width)
    candidate, reset = scratch.tensor_split([scratch.numel() // (sizes.layers + 1) * sizes.layers])
    kernels.forward[sizes.grid](
        x.contiguous(),
        x_weight,
        bias,
        weight,
        input_weight,
        w_p,
        b_p,
        w_u,
        slope,
        _contiguous(draw),
        _contiguous(lengths),
        pre,
        h,
        c,
        candidate,
        reset,
        saved_gate,
        last_gate,
        output,
        updates,
        sizes.batch,
        sizes.steps,
        slots,
        sizes.width,
        INPUTS=sizes.inputs,
        SAVE=save,
        PROJECTED=not few,
        **sizes.options,
    )
    last = [
        buffer[:, layer, -1, :, :hidden].flatten(1)
        for layer, hidden in enumerate(sizes.hidden)
        for buffer in (h, c)[: sizes.entries]
    ]
    return Outputs(output, torch.cat(last, 1), last_gate, updates, saved, saved_gate, projected)


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """skiprnn::recurrence_backward of R runs at once."""
    _, cell, policy, x, _, weights, _, policy_weights, _, lengths = problem
    _, _, _, updates, saved, saved_gate, _ = outputs
    d_output, d_final, d_gate, d_updates = arriving
    sizes = _Sizes(problem)
    h, c, pre = sizes.split(saved)
    weight, input_weight = _recurrent_weights(sizes, weights, operands(x.dtype))
    d_h, d_c = x.new_zeros(2, sizes.runs, sizes.layers, sizes.batch, sizes.width)
    if d_final is not None:
        lengths_of = [sizes.batch * hidden for hidden in sizes.hidden for _ in range(sizes.entries)]
        given = [part.view(sizes.runs, sizes.batch, -1) for part in d_final.split(lengths_of, 1)]
        for entry, into in zip(range(sizes.entries), (d_h, d_c), strict=False):
            _widened(given[entry :: sizes.entries], sizes, into)
    d_pre = torch.empty_like(pre)
    reset = x.new_empty(sizes.reset if cell == "gru" else 0)
    skip = policy == "skip"
    d_last_gate = x.new_zeros(sizes.runs, 2, sizes.batch) if d_gate is None else d_gate.clone()
    d_logit = x.new_empty(sizes.runs, sizes.steps, sizes.batch) if skip else x.new_empty(0)
    w_p, _, w_u, slope = _policy_arguments(sizes, policy, policy_weights)
    kernels.backward[sizes.grid](
        weight,
        input_weight,
        w_p,
        w_u,
        slope,
        _contiguous(lengths),
        updates,
        pre,
        h,
        c,
        saved_gate,
        _contiguous(d_output),
        _contiguous(d_updates),
        d_pre,
        d_h,
        d_c,
        x.new_empty(sizes.runs, sizes.batch, sizes.width),
        d_last_gate,
        d_logit,
        reset,
        sizes.batch,
        sizes.steps,
        sizes.width,
        **sizes.options,
    )
    found: list[Tensor] = []
    for layer, hidden in enumerate(sizes.hidden):
        for into in (d_h, d_c)[: sizes.entries]:
            found.append(into[:, layer, :, :hidden])
    found_weights, d_input_policy = _weight_gradients(sizes, cell, x, h, d_pre, reset)
    found += found_weights
    if skip:
        found += [*d_last_gate.unbind(1)]
        top = (c if cell == "lstm" else h)[:, -1, 1:, :, : sizes.hidden[-1]]
        found += [torch.einsum("rtb,rtbh->rh", d_logit, top), d_logit.sum((1, 2))]
    if policy == "selective":
        d_u = d_pre[:, 0, :, :, sizes.gates, : sizes.hidden[0]]
        d_state = (d_u * h[:, 0, :-1, :, : sizes.hidden[0]]).sum((1, 2))
        found += [d_input_policy, d_state, d_u.sum((1, 2)), torch.zeros_like(policy_weights[3])]
    d_x = x.new_empty(0)
    if needs_input:
        x_weight, _ = _input_weights(sizes, policy, weights, policy_weights)
        d_x = torch.bmm(
            d_pre[:, 0].reshape(sizes.runs, -1, x_weight[0, 0].numel()), x_weight.flatten(2).transpose(1, 2)
        )
        d_x = d_x.view(sizes.runs, sizes.steps, sizes.batch, -1).transpose(1, 2).contiguous()
    own = [gradient.clone(memory_format=torch.contiguous_format) for gradient in found]
    return Gradients.of([d_x, *own], problem)


def _weight_gradients(sizes: _Sizes, cell: str, x: Tensor, h: Tensor, d_pre: Tensor, reset: Tensor):
    """Of weight_ih, weight_hh and bias of every layer, and of Selective's W_i: products over all steps and rows."""
    found = []
    d_gate_input = None
    for layer, hidden in enumerate(sizes.hidden):
        d = d_pre[:, layer].reshape(sizes.runs, sizes.steps * sizes.batch, -1).transpose(1, 2)  # (R, X * W, T * B)

        def times(rows: Tensor, first: int = 0, last: int = sizes.columns, d=d) -> Tensor:
            """The gradients of the gates first to last, times rows (R, T, B, K): (R, gates, W, K)."""
            part = d[:, first * sizes.width : last * sizes.width]
            product = torch.bmm(part, rows.reshape(sizes.runs, sizes.steps * sizes.batch, -1))
            return product.view(sizes.runs, last - first, sizes.width, -1)

        before = h[:, layer, :-1]
        if cell == "gru":
            d_state = torch.cat([times(before, 0, 2), times(reset[:, layer], 2, 3)], 1)
        else:
            d_state = times(before, 0, sizes.gates)
        if layer:
            d_input = times(h[:, layer - 1, 1:], 0, sizes.gates)[..., : sizes.hidden[layer - 1]]
        else:
            d_input = times(x.transpose(1, 2))
        d_bias = d.sum(2).view(sizes.runs, sizes.columns, sizes.width)
        if sizes.columns > sizes.gates:
            d_gate_input = d_input[:, sizes.gates, :hidden]
        found.append(d_input[:, : sizes.gates, :hidden].reshape(sizes.runs, sizes.gates * hidden, -1))
        found.append(d_state[:, :, :hidden, :hidden].reshape(sizes.runs, sizes.gates * hidden, hidden))
        found.append(d_bias[:, : sizes.gates, :hidden].reshape(sizes.runs, -1))
    return found, d_gate_input


KERNELS["triton"] = Kernels(shapes, forward, backward)

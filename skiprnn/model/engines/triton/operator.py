"""skiprnn::recurrence on a GPU: what the kernels read and write, the products before and after the time loop.

Every tensor has a leading dimension R, the runs that share a launch. Other shapes: see parts.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from skiprnn.model.engines.operator import KERNELS, WEIGHTS, Arriving, Gradients, Kernels, Outputs, Problem
from skiprnn.model.engines.runs import contiguous, kept_shapes, of_input, summed_product
from skiprnn.model.engines.triton import parts, resident, streamed
from skiprnn.model.engines.triton.launch import FEW_INPUTS, TILE, columns, fits_chip, operands, padded


class _Sizes:
    """Sizes of a call, and what the kernels are compiled for."""

    def __init__(self, problem: Problem):
        self.gates, self.entries, self.hidden = problem.gates, problem.entries, problem.hidden
        self.runs, self.batch, self.steps, self.inputs = problem.x.shape
        self.layers, self.width = len(self.hidden), padded(max(self.hidden))
        self.columns = problem.blocks
        self.operands = operands(problem.x.dtype)
        self.resident = fits_chip(self.gates, self.layers, self.width, self.operands)
        self.options: dict[str, Any] = {
            "LSTM": problem.cell == "lstm",
            "POLICY": problem.policy,
            "H": self.hidden[-1],
            "W": self.width,
            "TILE": TILE,
            "BLOCK": columns(self.width, self.operands, self.resident),
            "num_warps": 8,
            "num_stages": 1 if self.resident else 3,
            "enable_fp_fusion": True,  # multiply and add in one instruction; the default differs between Tritons
        }
        if torch.version.hip is None:
            self.options["maxnreg"] = 255  # occupancy is not what limits: better more registers than spills
        if not self.resident:
            self.options["L"] = self.layers
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


def kept(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """The states and the pre-activations, and Skip's gate."""
    return kept_shapes(problem, save, _Sizes(problem).saved())


def _widen(tensors: Sequence[Tensor], into: Tensor) -> None:
    """One tensor (R, B, H) per layer -> into (R, L, B, W)."""
    for layer, tensor in enumerate(tensors):
        into[:, layer, :, : tensor.shape[-1]] = tensor


def _weights(sizes: _Sizes, policy: str, weights, policy_weights) -> parts.Weights:
    """All weights as the kernels read them."""
    runs, layers, gates, columns, width = sizes.runs, sizes.layers, sizes.gates, sizes.columns, sizes.width
    of_x = weights[0].new_zeros(runs, sizes.inputs, columns, width)
    bias = weights[0].new_zeros(runs, layers, columns, width)
    of_h = weights[0].new_zeros(runs, layers, gates, width, width, dtype=sizes.operands)
    of_below = weights[0].new_zeros(runs, max(layers - 1, 1), gates, width, width, dtype=sizes.operands)
    for layer, hidden in enumerate(sizes.hidden):
        three = weights[WEIGHTS * layer : WEIGHTS * (layer + 1)]
        by_input, by_state, by_gate = (weight.view(runs, gates, hidden, -1) for weight in three)
        of_h[:, layer, :, :hidden, :hidden] = by_state.mT
        bias[:, layer, :gates, :hidden] = by_gate.squeeze(3)
        if layer:
            of_below[:, layer - 1, :, : by_input.shape[3], :hidden] = by_input.mT
        else:
            of_x[:, :, :gates, :hidden] = by_input.permute(0, 3, 1, 2)
    w_p = b_p = w_u = slope = None
    more = width - sizes.hidden[-1]
    if policy == "skip":
        w_p, b_p = torch.nn.functional.pad(policy_weights[0], (0, more)), policy_weights[1].contiguous()
    if policy == "selective":
        of_x[:, :, gates, : sizes.hidden[0]] = policy_weights[0].mT
        bias[:, 0, gates, : sizes.hidden[0]] = policy_weights[2]
        w_u, slope = torch.nn.functional.pad(policy_weights[1], (0, more)), policy_weights[3].contiguous()
    return parts.Weights(of_x, bias, of_h, of_below, w_p, b_p, w_u, slope)


def forward(problem: Problem, save: bool) -> Outputs:
    """skiprnn::recurrence of R runs at once."""
    _, _, policy, x, states, weights, gate, policy_weights, draw, lengths = problem
    sizes, outputs = _Sizes(problem), Outputs.empty(problem, save)
    laid_out = _weights(sizes, policy, weights, policy_weights)
    few = sizes.inputs <= FEW_INPUTS
    nothing = x.new_empty(0)
    h, c, pre = sizes.split(outputs.saved) if save else (nothing, nothing, nothing if few else x.new_empty(sizes.pre))
    if not few:
        rows = x.transpose(1, 2).reshape(sizes.runs, -1, sizes.inputs)
        product = torch.baddbmm(laid_out.bias[:, 0].flatten(1).unsqueeze(1), rows, laid_out.of_x.flatten(2))
        pre[:, 0] = product.view(pre[:, 0].shape)
    now, last = [h, c], sizes.steps
    if sizes.resident or not save:
        slots = 1 if sizes.resident else 2
        now = list(x.new_empty(2, sizes.runs, sizes.layers, slots, sizes.batch, sizes.width))
        last = sizes.steps % slots
    for entry, buffer in zip(range(sizes.entries), now, strict=False):
        _widen(states[entry :: sizes.entries], buffer[:, :, 0].zero_())
    if policy == "skip":
        outputs.final_gate.copy_(torch.stack(list(gate), 1))
    inputs = parts.Inputs(x.contiguous(), contiguous(draw), contiguous(lengths))
    saved = parts.Saved(pre, h, c, outputs.saved_gate)
    arguments = inputs, laid_out, *now, outputs.final_gate, saved, outputs.output, outputs.updates
    options = {**sizes.options, "INPUTS": sizes.inputs if few else 0, "SAVE": save}
    if sizes.resident:
        resident.forward[sizes.grid](*arguments, sizes.batch, sizes.steps, **options)
    else:
        candidates, reset = x.new_empty(sizes.runs * (sizes.layers + 1), sizes.batch, sizes.width).split(
            [sizes.runs * sizes.layers, sizes.runs]
        )
        streamed.forward[sizes.grid](*arguments, candidates, reset, sizes.batch, sizes.steps, sizes.width, **options)
    final = [
        buffer[:, layer, last, :, :hidden].flatten(1)
        for layer, hidden in enumerate(sizes.hidden)
        for buffer in now[: sizes.entries]
    ]
    return outputs._replace(final=torch.cat(final, 1))


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """skiprnn::recurrence_backward of R runs at once."""
    _, cell, policy, x, _, weights, _, policy_weights, _, lengths = problem
    d_output, d_final, d_gate, d_updates = arriving
    sizes = _Sizes(problem)
    h, c, pre = sizes.split(outputs.saved)
    laid_out = _weights(sizes, policy, weights, policy_weights)
    d_h, d_c = x.new_zeros(2, sizes.runs, sizes.layers, sizes.batch, sizes.width)
    if d_final is not None:
        given = problem.split(d_final)
        for entry, into in zip(range(sizes.entries), (d_h, d_c), strict=False):
            _widen(given[entry :: sizes.entries], into)
    d_pre = torch.empty_like(pre)
    reset = x.new_empty(sizes.reset if cell == "gru" else 0)
    skip = policy == "skip"
    d_last_gate = x.new_zeros(sizes.runs, 2, sizes.batch) if d_gate is None else d_gate.clone()
    d_logit = x.new_empty(sizes.runs, sizes.steps, sizes.batch) if skip else x.new_empty(0)
    gradients = parts.Gradients(contiguous(d_output), contiguous(d_updates), d_h, d_c, d_last_gate, d_pre, d_logit)
    kept_parts = parts.Saved(pre, h, c, outputs.saved_gate)
    arguments = contiguous(lengths), laid_out, kept_parts, outputs.updates, gradients, reset
    if sizes.resident:
        resident.backward[sizes.grid](*arguments, sizes.batch, sizes.steps, **sizes.options)
    else:
        below = x.new_empty(sizes.runs, sizes.batch, sizes.width)
        streamed.backward[sizes.grid](*arguments, below, sizes.batch, sizes.steps, sizes.width, **sizes.options)
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
        d_x = of_input(d_pre[:, 0].flatten(3), laid_out.of_x.flatten(2).mT)
    return Gradients.of([d_x, *found], problem)


def _weight_gradients(sizes: _Sizes, cell: str, x: Tensor, h: Tensor, d_pre: Tensor, reset: Tensor):
    """Of weight_ih, weight_hh and bias of every layer, and of Selective's W_i: products over all steps and rows."""
    found, d_coordinator = [], None
    for layer, hidden in enumerate(sizes.hidden):
        d = d_pre[:, layer].flatten(3)  # (R, T, B, X * W)

        def times(rows: Tensor, first: int, last: int, d=d) -> Tensor:
            """The gradients of the blocks first to last, times rows (R, T, B, K): (R, blocks, W, K)."""
            product = summed_product(d[..., first * sizes.width : last * sizes.width], rows)
            return product.view(sizes.runs, last - first, sizes.width, -1)

        if cell == "gru":
            d_state = torch.cat([times(h[:, layer, :-1], 0, 2), times(reset[:, layer], 2, 3)], 1)
        else:
            d_state = times(h[:, layer, :-1], 0, sizes.gates)
        if layer:
            d_input = times(h[:, layer - 1, 1:], 0, sizes.gates)[..., : sizes.hidden[layer - 1]]
        else:
            d_input = times(x.transpose(1, 2), 0, sizes.columns)
            d_coordinator = d_input[:, -1, :hidden]
        d_bias = d.sum((1, 2)).view(sizes.runs, sizes.columns, sizes.width)
        found += [part[:, : sizes.gates, :hidden].flatten(1, 2) for part in (d_input, d_state[..., :hidden], d_bias)]
    return found, d_coordinator


KERNELS["triton"] = Kernels(kept, forward, backward)

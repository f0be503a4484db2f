"""The reference engine: the time loop in plain autograd. It defines what every other engine has to compute."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines.call import Call, Result
from skiprnn.model.policies import Gate, NeuronPolicy, Policy, StepPolicy, mix


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> None:
    """Every cell and policy is served, everywhere."""


def run(call: Call) -> Result:
    """Run a stack of cells under a policy over whole sequences, step by step."""
    cells, policy, x, states, gate, draw, lengths, _, dropped = call
    steps = x.shape[1]
    # unbind, not x[:, t]: the gradient of an index is a tensor as large as x, which makes backward quadratic in T
    inputs, projected = x.unbind(1), cells[0].project(x).unbind(1)
    draws: Sequence[Tensor | None] = [None] * steps
    valid: Sequence[Tensor | None] = [None] * steps
    if draw is not None:
        draws = (draw if draw.dim() == 3 else draw.unsqueeze(2)).unbind(1)
    if lengths is not None:
        alive = torch.arange(steps, device=x.device) < lengths.to(x.device).unsqueeze(1)
        valid = alive.unsqueeze(2).unbind(1)
    masks = list(zip(*(mask.unbind(1) for mask in dropped), strict=True)) or [()] * steps
    outputs, updates = [], []
    for t in range(steps):
        if isinstance(policy, StepPolicy):
            states, gate, u = step_stack(cells, policy, projected[t], states, gate, draws[t], valid[t], masks[t])
        else:
            states, u = step_neurons(cells, cast(NeuronPolicy, policy), inputs[t], states, draws[t], valid[t], masks[t])
        outputs.append(states[-1][0])
        updates.append(u)
    u = torch.stack(updates, 1)
    return Result(torch.stack(outputs, 1), list(states), gate, u.squeeze(2) if policy.family == "step" else u)


def step_stack(cells, policy: StepPolicy, projected: Tensor, states, gate: Gate, draw, valid, masks=()):
    """One step of a stack whose layers update or copy together; every candidate reads the candidate below."""
    accumulated = policy.decide(gate, draw)
    candidates = [cells[0].step(projected, states[0])]
    for layer, (cell, state) in enumerate(zip(cells[1:], states[1:], strict=True)):
        candidates.append(cell(masked(candidates[-1][0], masks, layer), state))
    updated = policy.after_update(gate, candidates[-1][-1])
    if accumulated is None:
        accumulated = torch.ones_like(projected[:, :1])
        if valid is None:
            return candidates, updated, accumulated
    u = decision(policy, policy.binarise(accumulated), valid)
    after = mix(u, updated, policy.after_skip(gate, accumulated))
    if valid is not None:
        after = tuple(torch.where(valid, new, old) for new, old in zip(after, gate, strict=True))
    return [mix(u, *pair) for pair in zip(candidates, states, strict=True)], after, u


def step_neurons(cells, policy: NeuronPolicy, x: Tensor, states, draw, valid, masks=()):
    """One step of a stack whose neurons update one by one; every layer reads the updated state below."""
    updated, decisions = [], []
    below = x
    draws = [None] * len(cells) if draw is None else draw.split([cell.hidden_size for cell in cells], dim=-1)
    for layer, (cell, state) in enumerate(zip(cells, states, strict=True)):
        u = decision(policy, policy.decide(layer, below, state[0], draws[layer]), valid)
        updated.append(mix(u, cell(below, state), state))
        decisions.append(u)
        below = masked(updated[-1][0], masks, layer)
    return updated, torch.cat(decisions, -1)


def masked(h: Tensor, masks: Sequence[Tensor], layer: int) -> Tensor:
    """What the layer above reads of a layer's h; the top has none above."""
    return h * masks[layer] if layer < len(masks) else h


def decision(policy: Policy, u: Tensor, valid: Tensor | None) -> Tensor:
    """u as it counts: without a gradient unless the policy learns, 0 beyond a sequence's end."""
    u = u if policy.learned else u.detach()
    return u if valid is None else torch.where(valid, u, 0)

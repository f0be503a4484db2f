"""The reference engine: the time loop in plain autograd. It defines what every other engine has to compute."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines.call import Call, Result, masked
from skiprnn.model.policies import Gate, NeuronPolicy, Policy, StepPolicy, mix


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> None:
    """Every cell and policy is served, everywhere."""


def run(call: Call) -> Result:
    """Run a stack of cells under a policy over whole sequences, step by step."""
    cells, policy, states, gate = call.cells, call.policy, call.states, call.gate
    inputs = cells[0].project(call.x) if isinstance(policy, StepPolicy) else call.x
    outputs, updates = [], []
    # unbind, not x[:, t]: the gradient of an index is a tensor as large as x, which makes backward quadratic in T
    for x, *given in zip(inputs.unbind(1), *call.by_step(), strict=True):
        if isinstance(policy, StepPolicy):
            states, gate, u = step_stack(cells, policy, x, states, gate, *given)
        else:
            states, u = step_neurons(cells, cast(NeuronPolicy, policy), x, states, *given)
        outputs.append(states[-1][0])
        updates.append(u)
    u = torch.stack(updates, 1)
    return Result(torch.stack(outputs, 1), list(states), gate, u.squeeze(2) if policy.family == "step" else u)


def step_stack(cells, policy: StepPolicy, projected: Tensor, states, gate: Gate, draw, valid, masks):
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
    after = next_gate(policy, gate, updated, accumulated, u, valid)
    return [mix(u, *pair) for pair in zip(candidates, states, strict=True)], after, u


def next_gate(policy: StepPolicy, gate: Gate, updated: Gate, accumulated: Tensor, u: Tensor, valid) -> Gate:
    """The gate after a step; `updated` where the step updates."""
    after = mix(u, updated, policy.after_skip(gate, accumulated))
    return after if valid is None else tuple(torch.where(valid, new, old) for new, old in zip(after, gate, strict=True))


def step_neurons(cells, policy: NeuronPolicy, x: Tensor, states, draw, valid, masks):
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


def decision(policy: Policy, u: Tensor, valid: Tensor | None) -> Tensor:
    """u as it counts: without a gradient unless the policy learns, 0 beyond a sequence's end."""
    u = u if policy.learned else u.detach()
    return u if valid is None else torch.where(valid, u, 0)

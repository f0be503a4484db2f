"""The reference engine: the time loop in plain autograd. It defines what every other engine has to compute.

Shapes: B batch, T steps, I input, H hidden of a layer, N neurons of all layers together.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, State
from skiprnn.model.policies import Gate, NeuronPolicy, Policy, StepPolicy, straight_through_round


def run(
    cells: Sequence[Cell],
    policy: Policy,
    x: Tensor,
    states: Sequence[State],
    gate: Gate,
    draw: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, list[State], Gate, Tensor]:
    """Run a stack of cells under a policy over whole sequences.

    Args:
        cells: the layers, from the input up.
        policy: when the states update.
        x: inputs (B, T, I).
        states: each layer's state before the first step.
        gate: the step policy's gate before the first step; () if it has none.
        draw: the policy's random decisions, (B, T) or (B, T, N); None if it draws nothing.
        lengths: (B,) steps of each sequence that count; None for all T. Later steps update nothing.

    Returns:
        output (B, T, H of the top layer), final states, final gate, updates (B, T) or (B, T, N).
    """
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
    outputs, updates = [], []
    for t in range(steps):
        if isinstance(policy, StepPolicy):
            states, gate, u = step_stack(cells, policy, projected[t], states, gate, draws[t], valid[t])
        else:
            states, u = step_neurons(cells, cast(NeuronPolicy, policy), inputs[t], states, draws[t], valid[t])
        outputs.append(states[-1][0])
        updates.append(u)
    u = torch.stack(updates, 1)
    return torch.stack(outputs, 1), list(states), gate, u if policy.per_neuron else u.squeeze(2)


def step_stack(cells, policy: StepPolicy, projected: Tensor, states, gate: Gate, draw, valid):
    """One step of a stack whose layers update or copy together; every candidate reads the candidate below."""
    candidates = [cells[0].step(projected, states[0])]
    for cell, state in zip(cells[1:], states[1:], strict=True):
        candidates.append(cell(candidates[-1][0], state))
    accumulated = policy.decide(gate, draw)
    if accumulated is None:
        if valid is None:
            return candidates, gate, torch.ones_like(projected[:, :1])
        accumulated = valid.to(projected.dtype)
    u = straight_through_round(accumulated)
    if valid is not None:
        u = u * valid
    proposed = policy.advance(gate, accumulated, u, candidates[-1][-1])
    if valid is None:
        gate = proposed
    else:
        gate = tuple(torch.where(valid, new, old) for new, old in zip(proposed, gate, strict=True))
    return [mix(u, *pair) for pair in zip(candidates, states, strict=True)], gate, u


def step_neurons(cells, policy: NeuronPolicy, x: Tensor, states, draw, valid):
    """One step of a stack whose neurons update one by one; every layer reads the updated state below."""
    updated, decisions = [], []
    below = x
    draws = [None] * len(cells) if draw is None else draw.split([cell.hidden_size for cell in cells], dim=-1)
    for layer, (cell, state) in enumerate(zip(cells, states, strict=True)):
        u = policy.decide(layer, below, state[0], draws[layer])
        if valid is not None:
            u = u * valid
        updated.append(mix(u, cell(below, state), state))
        decisions.append(u)
        below = updated[-1][0]
    return updated, torch.cat(decisions, -1)


def mix(u: Tensor, candidate: State, previous: State) -> State:
    """u * candidate + (1 - u) * previous, entry by entry; u is (B, 1) or (B, H)."""
    return tuple(u * new + (1 - u) * old for new, old in zip(candidate, previous, strict=True))

"""The compact engine: the reference's time loop over those rows alone that update. The fallback where nothing compiles.

Only for decisions that carry no gradient, random steps and Skip's inference: what a learned decision is worth takes the
candidate that was not taken (the native engine has it without a product).
Shapes: B batch, T steps, I input, H hidden of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, State
from skiprnn.model.policies import Gate, Policy, RandomSteps, Skip, StepPolicy


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if not isinstance(policy, RandomSteps | Skip):
        return "it serves the policies that skip steps"
    if isinstance(policy, Skip) and torch.is_grad_enabled():
        return "a learned decision's gradient needs the candidates that were not taken"
    if x.device.type != "cpu":
        return f"it runs on the CPU, where counting rows is free; x is on {x.device}"
    return None


def run(
    cells: Sequence[Cell],
    policy: StepPolicy,
    x: Tensor,
    states: Sequence[State],
    gate: Gate,
    draw: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, list[State], Gate, Tensor]:
    """As reference.run."""
    batch, steps, _ = x.shape
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    valid = (torch.arange(steps) < lengths.unsqueeze(1)).unsqueeze(2).unbind(1)  # (B, 1) each
    inputs = x.unbind(1)
    draws: Sequence[Tensor | None] = [None] * steps if draw is None else draw.unsqueeze(2).unbind(1)
    states, outputs, updates = list(states), [], []
    for t in range(steps):
        accumulated = policy.decide(gate, draws[t])
        assert accumulated is not None
        u = torch.round(accumulated) * valid[t]
        rows = u.squeeze(1).nonzero().squeeze(1)
        if len(rows):
            below = inputs[t][rows]
            for layer, cell in enumerate(cells):
                candidate = cell(below, tuple(entry[rows] for entry in states[layer]))
                states[layer] = tuple(
                    old.index_copy(0, rows, new) for old, new in zip(states[layer], candidate, strict=True)
                )
                below = candidate[0]
        proposed = policy.advance(gate, accumulated, u, states[-1][-1])  # rows that skip do not look at the state
        gate = tuple(torch.where(valid[t], new, old) for new, old in zip(proposed, gate, strict=True))
        outputs.append(states[-1][0])
        updates.append(u)
    return torch.stack(outputs, 1), states, gate, torch.cat(updates, 1)

"""The compact engine: the reference's time loop over those rows alone that update. The fallback where nothing compiles.

Only for decisions that carry no gradient, random steps and Skip's inference: what a learned decision is worth takes the
candidate that was not taken (the native engine has it without a product).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from skiprnn.model.cells import Cell
from skiprnn.model.engines.call import Call, Result, masked, unknown
from skiprnn.model.engines.reference import decision, next_gate
from skiprnn.model.policies import Policy, RandomSteps, Skip, StepPolicy, mix


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    reason = unknown(cells, policy)
    if reason is not None:
        return reason
    if not isinstance(policy, RandomSteps | Skip):
        return "it serves the policies that skip steps"
    if policy.learned and torch.is_grad_enabled():
        return "a learned decision's gradient needs the candidates that were not taken"
    if x.device.type != "cpu":
        return f"it runs on the CPU, where counting rows is free; x is on {x.device}"
    return None


def run(call: Call) -> Result:
    """As reference.run."""
    cells, policy, gate = call.cells, cast(StepPolicy, call.policy), call.gate
    states, outputs, updates = list(call.states), [], []
    for x, draw, valid, masks in zip(call.x.unbind(1), *call.by_step(), strict=True):
        accumulated = policy.decide(gate, draw)
        assert accumulated is not None
        u = decision(policy, policy.binarise(accumulated), valid)
        rows = u.squeeze(1).nonzero().squeeze(1)
        if len(rows):
            below = x[rows]
            for layer, cell in enumerate(cells):
                before = tuple(entry[rows] for entry in states[layer])
                candidate = cell(below, before)
                after = mix(u[rows], candidate, before)  # all of it, unless u is nan
                states[layer] = tuple(
                    old.index_copy(0, rows, new) for old, new in zip(states[layer], after, strict=True)
                )
                below = masked(candidate[0], [part[rows] for part in masks], layer)
        gate = next_gate(policy, gate, policy.after_update(gate, states[-1][-1]), accumulated, u, valid)
        outputs.append(states[-1][0])
        updates.append(u)
    return Result(torch.stack(outputs, 1), states, gate, torch.cat(updates, 1))

"""Calls as the operator takes them: in stacks whose layers one decision ties together, each a Problem of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skiprnn.model.engines.call import Call, Result, masked
from skiprnn.model.engines.operator import Outputs, Problem
from skiprnn.model.policies import Policy, Selective, Skip


def by_layers(calls: Sequence[Call], run: Callable[[Sequence[Call], int], list[Result]]) -> list[Result]:
    """Networks of one architecture by `run`, which takes stacks of theirs and the number of the stacks' first layer.

    Only Skip's gate ties the layers together; otherwise they run one after the other.
    """
    if isinstance(calls[0].policy, Skip):
        return run(calls, 0)
    xs = [call.x for call in calls]
    draws = [_draws(call) for call in calls]
    by_layer: list[list[Result]] = []
    for layer in range(len(calls[0].cells)):
        parts = [
            call._replace(cells=[call.cells[layer]], x=x, states=[call.states[layer]], draw=draw[layer])
            for call, x, draw in zip(calls, xs, draws, strict=True)
        ]
        by_layer.append(run(parts, layer))
        xs = [masked(result.output, call.masks, layer) for result, call in zip(by_layer[-1], calls, strict=True)]
    return [
        Result(
            layers[-1].output,
            [state for result in layers for state in result.states],
            call.gate,
            torch.cat([result.updates for result in layers], -1)
            if call.policy.family == "neuron"
            else layers[0].updates,
        )
        for call, layers in zip(calls, zip(*by_layer, strict=True), strict=True)
    ]


def _draws(call: Call) -> Sequence[Tensor | None]:
    """Each layer's part of the draw."""
    if call.draw is None or call.policy.family == "step":
        return [call.draw] * len(call.cells)
    return call.draw.split([cell.hidden_size for cell in call.cells], -1)


def problem_of(engine: str, call: Call, layer: int) -> Problem:
    """A stack as the operator takes it, from the call of `by_layers`."""
    names = engine, call.cells[0].name, call.policy.name
    states = [entry for state in call.states for entry in state]
    weights = [weight for cell in call.cells for weight in (cell.weight_ih, cell.weight_hh, cell.total_bias)]
    gate = [part.squeeze(1) for part in call.gate]
    return Problem(*names, call.x, states, weights, gate, _weights(call.policy, layer), call.draw, call.lengths)


def _weights(policy: Policy, layer: int) -> list[Tensor]:
    """What of the policy the operator takes."""
    if isinstance(policy, Skip):
        return [policy.weight, policy.bias.squeeze(0)]
    if isinstance(policy, Selective):
        coordinator = policy.coordinators[layer]
        return [coordinator.weight_input, coordinator.weight_state, coordinator.bias, policy.slope]
    return []


def result_of(call: Call, problem: Problem, outputs: Outputs) -> Result:
    """The operator's outputs as a stack's result."""
    entries = problem.split(outputs.final)
    states = [tuple(entries[start : start + problem.entries]) for start in range(0, len(entries), problem.entries)]
    gate = tuple(part.unsqueeze(1) for part in outputs.final_gate) if call.gate else call.gate
    updates = outputs.updates if call.policy.learned else outputs.updates.detach()
    return Result(outputs.output, states, gate, updates)

"""The native engine: the recurrence in C++ on the CPU, at a cost that falls with the state updates, exactly.

LSTM and GRU under every policy, float32 and float64, without layer normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, LSTMCell, State
from skiprnn.model.engines.native import build
from skiprnn.model.policies import Always, Gate, Policy, RandomNeurons, RandomSteps, Selective, Skip

POLICY_NAMES: dict[type, str] = {
    Always: "always",
    RandomSteps: "random_steps",
    Skip: "skip",
    RandomNeurons: "random_neurons",
    Selective: "selective",
}


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if x.device.type != "cpu":
        return f"it runs on the CPU; x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64; x is {x.dtype}"
    if any(cell.layer_norm for cell in cells):
        return "it has no layer normalisation"
    if type(policy) not in POLICY_NAMES:
        return f"it does not know the policy {type(policy).__name__}"
    if not build.available():
        return "it is not compiled"
    return None


def run(
    cells: Sequence[Cell],
    policy: Policy,
    x: Tensor,
    states: Sequence[State],
    gate: Gate,
    draw: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, list[State], Gate, Tensor]:
    """As reference.run. Only Skip's gate ties the layers together; otherwise they run one after the other."""
    if isinstance(policy, Skip):
        return _run_layers(cells, policy, [policy.weight, policy.bias], x, states, gate, draw, lengths)
    draws = [draw] * len(cells)
    if isinstance(policy, RandomNeurons) and draw is not None:
        draws = list(draw.split([cell.hidden_size for cell in cells], dim=-1))
    final, updates = [], []
    for layer, (cell, state) in enumerate(zip(cells, states, strict=True)):
        weights: list[Tensor] = []
        if isinstance(policy, Selective):
            coordinator = policy.coordinators[layer]
            weights = [coordinator.weight_input, coordinator.weight_state, coordinator.bias, policy.slope]
        x, (after,), _, u = _run_layers([cell], policy, weights, x, [state], (), draws[layer], lengths)
        final.append(after)
        updates.append(u)
    return x, final, gate, torch.cat(updates, -1) if policy.per_neuron else updates[0]


def _run_layers(cells, policy, policy_weights, x, states, gate, draw, lengths):
    from skiprnn.model.engines.native.operator import apply, split_states

    flat_states = [entry for state in states for entry in state]
    weights = [weight for cell in cells for weight in (cell.weight_ih, cell.weight_hh, cell.bias)]
    flat_gate = [part.reshape(-1) for part in gate]
    inputs = [x, *flat_states, *weights, *flat_gate, *policy_weights]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if not (save and x.requires_grad) and all(entry.stride(0) == 0 for entry in flat_states):  # one, expanded
        flat_states, flat_gate = [entry[:1] for entry in flat_states], [part[:1] for part in flat_gate]
    cell = "lstm" if isinstance(cells[0], LSTMCell) else "gru"
    output, final, final_gate, updates, *_ = apply(
        cell, POLICY_NAMES[type(policy)], x, flat_states, weights, flat_gate, policy_weights, draw, lengths, save
    )
    after = split_states(final, x.shape[0], [c.hidden_size for c in cells], len(states[0]))
    gate = tuple(part.unsqueeze(1) for part in final_gate) if gate else gate
    return output, after, gate, updates if policy.learned else updates.detach()

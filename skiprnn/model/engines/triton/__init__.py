"""The GPU engine: the whole time loop in one kernel per pass, written in Triton; several runs may share a launch.

LSTM and GRU under every policy, float32, without layer normalisation, up to 512 units. The recurrent products have
tf32's precision, or float32's where torch.backends.cudnn.rnn.fp32_precision is "ieee", as torch.nn.LSTM's have.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, LSTMCell, State
from skiprnn.model.engines.native import POLICY_NAMES
from skiprnn.model.engines.triton.launch import TILE, operands, padded, wasteful
from skiprnn.model.policies import Gate, Policy, RandomNeurons, Selective, Skip

LARGEST = 512  # units: beyond that a tile of rows leaves the chip too often

Run = tuple[Sequence[Cell], Policy, Tensor, Sequence[State], Gate, Tensor | None, Tensor | None]  # run's arguments
Result = tuple[Tensor, list[State], Gate, Tensor]


@cache
def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1): slow, for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if x.device.type != "cuda" and not interpreted():
        return f"it runs on a GPU; x is on {x.device}"
    if x.dtype != torch.float32 and not interpreted():
        return f"it computes in float32; x is {x.dtype}"
    if any(cell.layer_norm for cell in cells):
        return "it has no layer normalisation"
    if type(policy) not in POLICY_NAMES:
        return f"it does not know the policy {type(policy).__name__}"
    widest = max(cell.hidden_size for cell in cells)
    if widest > LARGEST:
        return f"it serves up to {LARGEST} units; there are {widest}"
    if x.device.type == "cuda":
        layers = len(cells) if isinstance(policy, Skip) else 1  # that are run at once
        programs, processors = -(-len(x) // TILE), torch.cuda.get_device_properties(x.device).multi_processor_count
        if wasteful(cells[0].gates, layers, padded(widest), operands(x.dtype), programs, processors):
            return f"for {widest} units it is slow where it uses {programs} of the GPU's {processors} processors"
    return None


def run(*arguments) -> Result:
    """As reference.run."""
    return run_packed([arguments])[0]


def run_packed(runs: Sequence[Run]) -> list[Result]:
    """Several networks of one cell, policy and size on batches of one shape, in one launch.

    Only Skip's gate ties the layers together; otherwise they run one after the other.
    """
    policies = [policy for _, policy, *_ in runs]
    if isinstance(policies[0], Skip):
        return _run_layers(runs, [[policy.weight, policy.bias] for policy in policies if isinstance(policy, Skip)])
    results: list[Result] = []
    xs = [x for _, _, x, *_ in runs]
    finals: list[list[State]] = [[] for _ in runs]
    updates: list[list[Tensor]] = [[] for _ in runs]
    first = 0
    for layer, cell in enumerate(runs[0][0]):
        of_layer: list[Run] = []
        weights: list[list[Tensor]] = []
        for (cells, policy, _, states, _, draw, lengths), x in zip(runs, xs, strict=True):
            if isinstance(policy, RandomNeurons) and draw is not None:
                draw = draw[:, :, first : first + cell.hidden_size]
            of_layer.append(([cells[layer]], policy, x, [states[layer]], (), draw, lengths))
            weights.append(_coordinator(policy, layer))
        results = _run_layers(of_layer, weights)
        xs = [output for output, *_ in results]
        for final, update, (_, (after,), _, u) in zip(finals, updates, results, strict=True):
            final.append(after)
            update.append(u)
        first += cell.hidden_size
    return [
        (x, final, gate, torch.cat(update, -1) if policy.per_neuron else update[0])
        for x, final, update, (_, policy, _, _, gate, _, _) in zip(xs, finals, updates, runs, strict=True)
    ]


def _coordinator(policy: Policy, layer: int) -> list[Tensor]:
    if not isinstance(policy, Selective):
        return []
    coordinator = policy.coordinators[layer]
    return [coordinator.weight_input, coordinator.weight_state, coordinator.bias, policy.slope]


def _run_layers(runs: Sequence[Run], policy_weights: Sequence[list[Tensor]]) -> list[Result]:
    """The operator on all runs' tensors, stacked (R, ...)."""
    import skiprnn.model.engines.triton.operator  # noqa: F401  (registers the kernels; here, for not everybody has Triton)
    from skiprnn.model.engines.native.operator import apply, split_states

    def stacked(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.stack(list(tensors)) for tensors in zip(*lists, strict=True)]

    def all_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack([tensor for tensor in tensors if tensor is not None])

    cells, policy, x, states, gate, *_ = runs[0]
    lists: list[Sequence[Sequence[Tensor]]] = [
        [[entry for state in states for entry in state] for _, _, _, states, _, _, _ in runs],
        [[w for cell in cells for w in (cell.weight_ih, cell.weight_hh, cell.bias)] for cells, *_ in runs],
        [[part.reshape(-1) for part in gate] for _, _, _, _, gate, _, _ in runs],
        policy_weights,
    ]
    (xs,) = stacked([[x] for _, _, x, *_ in runs])
    flat_states, weights, flat_gate, flat_policy = map(stacked, lists)
    inputs = [xs, *flat_states, *weights, *flat_gate, *flat_policy]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    output, final, final_gate, updates, *_ = apply(
        "lstm" if isinstance(cells[0], LSTMCell) else "gru",
        POLICY_NAMES[type(policy)],
        xs,
        flat_states,
        weights,
        flat_gate,
        flat_policy,
        all_or_none([draw for *_, draw, _ in runs]),
        all_or_none([lengths if lengths is None else lengths.to(x.device) for *_, lengths in runs]),
        save,
    )
    if not policy.learned:
        updates = updates.detach()
    hidden = [cell.hidden_size for cell in cells]
    results: list[Result] = []
    gates = final_gate.unbind() if gate else [()] * len(runs)
    for out, last, gate, u in zip(output.unbind(), final.unbind(), gates, updates.unbind(), strict=True):
        after = split_states(last, x.shape[0], hidden, len(states[0]))
        results.append((out, after, tuple(part.unsqueeze(1) for part in gate), u))
    return results

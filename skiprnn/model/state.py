"""What a recurrent network remembers between two calls, in torch.nn.LSTM's and torch.nn.GRU's form.

(h, c) of an LSTM, h of a GRU, (L, B, H) each. Where the policy has a gate state it rides along on h, so that feeding
the state back continues exactly; h computed in any other way has none, and the gate starts anew.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, State
from skiprnn.model.policies import Gate


class GatedState(Tensor):
    """h (L×D, B, H) with the policy's gate state, (B, 1) each part, which copies take along; what else is computed from
    it is a plain tensor.
    """

    gate_state: Gate  # (B, 1) each; Skip: update_prob and cum_update_prob

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if function not in COPIES:
                return result
            return attach(result, tuple(function(part, *args[1:], **kwargs) for part in args[0].gate_state))

    def __deepcopy__(self, memo):
        return attach(copy.deepcopy(self[:], memo), copy.deepcopy(self.gate_state, memo))


COPIES = frozenset(
    (
        *(Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory),
        *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    )
)
torch.serialization.add_safe_globals([GatedState])  # a stored state loads with weights_only=True


def attach(h: Tensor, gate: Gate) -> Tensor:
    """h with the gate state; plain h where there is none."""
    if not gate:
        return h
    if not torch.compiler.is_exporting():  # its tensors cannot change their class
        h = h.as_subclass(GatedState)
    h.gate_state = gate  # type: ignore[attr-defined]
    return h


def each(state, change):
    """A state whose tensors are changed between one sequence and a batch of one; change is unsqueeze or squeeze."""
    if isinstance(state, Tensor):
        return attach(change(state, -2), tuple(change(part, 0) for part in getattr(state, "gate_state", ())))
    return None if state is None else tuple(each(part, change) for part in state)


def converted(state, dtype: torch.dtype):
    """A state whose tensors have another precision; autocast leaves float64 as it is."""
    if isinstance(state, Tensor):
        return state if not state.is_floating_point() or torch.float64 in (state.dtype, dtype) else state.to(dtype)
    return tuple(converted(part, dtype) for part in state) if isinstance(state, list | tuple) else state


def packed(states: Sequence[State], gate: Gate, stacked: bool) -> Any:
    """The public form of each layer's state and the gate; an entry is one tensor if `stacked`, else a tuple."""
    entries: list[Any] = [torch.stack(entry) if stacked else list(entry) for entry in zip(*states, strict=True)]
    if stacked:
        entries[0] = attach(entries[0], gate)
    else:
        entries[0][-1] = attach(entries[0][-1], gate)
        entries = [tuple(entry) for entry in entries]
    return entries[0] if len(entries) == 1 else tuple(entries)


def unpacked(state: Any, cells: Sequence[Cell], gate: Gate, batch_size: int, stacked: bool) -> tuple[list[State], Gate]:
    """Each layer's state, (B, H) per entry, and the gate.

    Args:
        state: what a caller gave, as `packed` has it, perhaps with the gate's parts behind it.
        cells: the layers.
        gate: the one to begin with where none is given.
        batch_size: B.
        stacked: whether an entry may be one tensor.

    Raises:
        ValueError: it does not fit; the message says what.
    """
    names, dtype = cells[0].state_names, cells[0].weight_ih.dtype
    parts: list[Any] = [state] if isinstance(state, Tensor) else []
    if isinstance(state, Sequence) and not isinstance(state, str):
        one = len(names) == 1 and not stacked and state and isinstance(state[0], Tensor)  # of a GRU
        parts = [state] if one else list(state)
    if not all(map(_holds_tensors, parts)):
        parts = []
    if len(parts) not in (len(names), len(names) + len(gate)):
        wanted = f"{', '.join(names)}{' and the gate' if gate else ''}"
        found = f"{len(parts)} parts" if parts else type(state).__name__
        raise ValueError(f"state must hold {wanted}; got {found}")
    entries, given = parts[: len(names)], tuple(parts[len(names) :])
    if not given and gate:  # it rides along on h, or on the top layer's h where they differ in size
        given = getattr(entries[0] if isinstance(entries[0], Tensor) else entries[0][-1], "gate_state", ())
    expected = [(batch_size, cell.hidden_size) for cell in cells]
    for name, entry in zip(names, entries, strict=True):
        shapes = [tuple(layer.shape) for layer in entry]
        if shapes != expected:
            raise ValueError(f"state {name} must be {expected} over the layers; got {shapes}")
    if given and [tuple(part.shape) for part in given] != [(batch_size, 1)] * len(gate):
        shapes = [tuple(part.shape) for part in given]
        raise ValueError(f"the state's gate must be {len(gate)} of {(batch_size, 1)}; got {shapes}")
    for name, entry in zip(names, entries, strict=True):
        for layer in entry:
            if layer.dtype != dtype:
                raise ValueError(f"state {name} is {layer.dtype}, the parameters are {dtype}: convert one of them")
    given = tuple(part.to(own.dtype) for part, own in zip(given, gate, strict=False))
    return list(zip(*entries, strict=True)), given or gate


def _holds_tensors(part: Any) -> bool:
    """Whether it is a tensor of layers, or a sequence of tensors."""
    if isinstance(part, Tensor):
        return bool(part.dim())
    return isinstance(part, Sequence) and all(isinstance(layer, Tensor) for layer in part)

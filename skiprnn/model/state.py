"""What a recurrent network remembers between two calls, in torch.nn.LSTM's and torch.nn.GRU's form.

(h, c) of an LSTM, h of a GRU, (L, B, H) each. Where the policy has a gate state it rides along on h, so that feeding
the state back continues exactly; h computed in any other way has none, and the gate starts anew.
"""

import copy

import torch
from torch import Tensor

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

"""What an engine is given and what it gives back; which cells and policies the fast engines know.

Shapes: B batch, T steps, I input, H hidden of a layer, N neurons of all layers together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from skiprnn.model.cells import Cell, GRUCell, LSTMCell, State
from skiprnn.model.policies import Always, Coordinator, Gate, Policy, RandomNeurons, RandomSteps, Selective, Skip

# In the order of the enumerations in native/problem.h and cuda/kernels.cu. By identity: what a subclass changes, only
# the reference engine sees.
CELLS: tuple[type[Cell], ...] = (LSTMCell, GRUCell)
POLICIES: tuple[type[Policy], ...] = (Always, RandomSteps, Skip, RandomNeurons, Selective)


class Call(NamedTuple):
    """A stack of cells under a policy, and the sequences that it shall run over."""

    cells: Sequence[Cell]  # the layers, from the input up
    policy: Policy
    x: Tensor  # (B, T, I)
    states: Sequence[State]  # each layer's before the first step, (B, H) per entry
    gate: Gate  # the step policy's before the first step, (B, 1) each; () if it has none
    draw: Tensor | None = None  # the policy's random decisions, (B, T) or (B, T, N)
    lengths: Tensor | None = None  # (B,) int64: steps that count, later ones update nothing; None: all T
    alike: bool = False  # all sequences begin with the state and the gate of the first
    masks: Sequence[Tensor] = ()  # dropout: what each layer but the top gives to the next is times this, (B, T, H)

    def by_step(self) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Sequence[Tensor]]]:
        """For every step: its draw (B, 1) or (B, N), whether it counts (B, 1), and its masks."""
        steps = self.x.shape[1]
        draws: Sequence[Tensor | None] = [None] * steps
        counting: Sequence[Tensor | None] = [None] * steps
        if self.draw is not None:
            draws = (self.draw if self.draw.dim() == 3 else self.draw.unsqueeze(2)).unbind(1)
        if self.lengths is not None:
            counting = valid(self.lengths, steps).unsqueeze(2).unbind(1)
        return draws, counting, list(zip(*(mask.unbind(1) for mask in self.masks), strict=True)) or [()] * steps


class Result(NamedTuple):
    """What became of them."""

    output: Tensor  # (B, T, H of the top layer)
    states: Sequence[State]  # as in Call, after the last step that counts
    gate: Gate
    updates: Tensor  # (B, T) of a step policy, (B, T, N) of a neuron policy; without a gradient unless it learns


def valid(lengths: Tensor, steps: int) -> Tensor:
    """Whether each step counts, (..., T), by the lengths (...)."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(-1)


def masked(h: Tensor, masks: Sequence[Tensor], layer: int) -> Tensor:
    """What the layer above reads of a layer's h; the top has none above."""
    return h * masks[layer] if layer < len(masks) else h


# What the fast engines do themselves: an object that has its own is not what its class says.
REPLACED = frozenset(("step", "project", "forward", "decide", "binarise", "after_update", "after_skip"))


def unknown(cells: Sequence[Cell], policy: Policy) -> str | None:
    """Why no engine but the reference serves these; None if the others know them."""
    parts: list[tuple[str, Module, tuple[type[Module], ...]]] = [("policy", policy, POLICIES)]
    parts += [("cell", cell, CELLS) for cell in cells]
    if isinstance(policy, Selective):
        parts += [("coordinator", coordinator, (Coordinator,)) for coordinator in policy.coordinators]
    for what, part, known in parts:
        if type(part) not in known:
            return f"it does not know the {what} {type(part).__name__}"
        hooked = what == "coordinator" and (part._forward_pre_hooks or part._forward_hooks)
        if hooked or not REPLACED.isdisjoint(vars(part)):
            return f"it does not know the {what} {type(part).__name__} as it was changed"
    return None if len({type(cell) for cell in cells}) == 1 else "its layers are of one cell"

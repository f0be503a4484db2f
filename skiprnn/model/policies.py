"""When a state may be updated: the update policies of both papers.

A step policy decides once per step for the whole stack of layers, u of shape (B, 1); a neuron policy decides for every
neuron of every layer, u of shape (B, H). In both cases s_t = u_t * candidate + (1 - u_t) * s_{t-1}, and the gradient
passes straight through the rounding that makes u_t binary.

Shapes: B batch, T steps, I input, H hidden, N neurons of all layers together. Randomness comes from torch's generator.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from skiprnn.model.cells import Cell

Gate = tuple[Tensor, ...]  # what a step policy carries from step to step; (B, 1) each


def binary(x: Tensor) -> Tensor:
    """1 above 0.5, else 0; nan stays nan. Without a gradient."""
    return torch.where(x.isnan(), x, (x > 0.5).to(x.dtype))


def blend(u: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """u * new + (1 - u) * old, where what is not taken counts for nothing, whatever it is: 0 * nan is 0."""
    return torch.where(u == 0, old, torch.where(u == 1, new, u * new + (1 - u) * old))


def blend_backward(u: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients in new and old."""
    return torch.where(u == 0, 0, u * gradient), torch.where(u == 1, 0, (1 - u) * gradient)


class _StraightThroughRound(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(binary)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _StraightThroughRoundForwards(_StraightThroughRound):  # torch.compile sees through no custom jvp
    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.clone()


def straight_through_round(x: Tensor) -> Tensor:
    """1 above 0.5, else 0, so that 0.5 is no update (round half to even); nan stays nan; du/dx = 1.

    ([SKIP] section 3.1; _binary_round in the authors' code.)
    """
    return (_StraightThroughRound if torch.compiler.is_compiling() else _StraightThroughRoundForwards).apply(x)


class _Mix(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(blend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        u, new, old = ctx.saved_tensors
        of_u = (gradient * (new - old)).sum_to_size(u.shape) if ctx.needs_input_grad[0] else None
        if not torch.is_grad_enabled():
            return of_u, *blend_backward(u, gradient)
        nothing = torch.zeros_like(gradient)  # the same, whose own derivative in u is not 0
        return of_u, _Mix.apply(u, gradient, nothing), _Mix.apply(u, nothing, gradient)


class _MixForwards(_Mix):
    @staticmethod
    def jvp(ctx, of_u: Tensor | None, of_new: Tensor | None, of_old: Tensor | None) -> Tensor:
        u, new, old = ctx.saved_tensors
        new_part, old_part = (torch.zeros_like(new) if part is None else part for part in (of_new, of_old))
        kept = _MixForwards.apply(u, new_part, old_part)
        return kept if of_u is None else kept + of_u * (new - old)


def mix(u: Tensor, candidate: Sequence[Tensor], previous: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """u * candidate + (1 - u) * previous, entry by entry, as `blend` has it; u is (B, 1) or (B, H)."""
    kind = _Mix if torch.compiler.is_compiling() else _MixForwards
    return tuple(kind.apply(u.to(new.dtype), new, old) for new, old in zip(candidate, previous, strict=True))


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """What sums over steps are kept in: float32 for half precision, whose 8 or 11 bits lose small increments."""
    return torch.promote_types(dtype, torch.float32)


class Policy(nn.Module, ABC):
    """Base of all policies. What a policy is, its class says: configs, engines, tables and figures ask it."""

    name: ClassVar[str]  # in configs and records
    label: ClassVar[str]  # of a model in tables and figures: a format, given the cell's label
    about: ClassVar[str]  # a sentence for model cards
    family: ClassVar[Literal["step", "neuron"]]  # what decides for itself
    learned: ClassVar[bool]  # whether its decisions have a gradient, so that a budget λ can change them
    draws: ClassVar[bool] = False  # whether it skips at random: takes p_skip

    @classmethod
    def for_cells(cls, cells: Sequence[Cell], p_skip: float | None = None) -> Self:
        """The policy of a stack of cells; p_skip is given to those that draw."""
        return cls()

    def reset_parameters(self) -> None:
        """Draw the policy's parameters anew."""

    def start_open(self) -> None:
        """Let what is learned start where everything updates, whatever is read: a trained cell computes as before."""

    def draw(self, x: Tensor, neurons: int) -> Tensor | None:
        """The random decisions of a whole batch of sequences x (B, T, I), drawn at once; None for a policy without."""
        return None

    def flops_per_step(self) -> int:
        """Multiplications at every step, updated or not."""
        return 0

    def flops_per_update(self) -> int:
        """Multiplications at every step that updates, on top of the cell's."""
        return 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the policy that training epoch `epoch` (from 0) begins, for what is annealed by epoch."""


class StepPolicy(Policy):
    """Decides per step; all layers update or copy together."""

    family = "step"
    gate_names: ClassVar[tuple[str, ...]] = ()  # of what it carries from step to step

    def initial_gate(self, batch_size: int) -> Gate:
        """The gate before the first step."""
        return ()

    @abstractmethod
    def decide(self, gate: Gate, draw: Tensor | None) -> Tensor | None:
        """The gate's value before rounding, (B, 1) in [0, 1]; None where every step updates."""

    def binarise(self, accumulated: Tensor) -> Tensor:
        """The decision u (B, 1), 0 or 1, from what `decide` gave."""
        return straight_through_round(accumulated)

    def after_update(self, gate: Gate, top: Tensor) -> Gate:
        """The gate after a step that updates; top is the last entry of the top layer's new state (B, H)."""
        return gate

    def after_skip(self, gate: Gate, accumulated: Tensor) -> Gate:
        """The gate after a step that is skipped, whose sample nobody looked at; accumulated is what `decide` gave."""
        return gate


class Always(StepPolicy):
    """Every step updates: the plain LSTM and GRU."""

    name = "always"
    label = "{}"
    about = "The papers' baseline: updates its state at every step."
    learned = False

    def decide(self, gate, draw):
        return None


class RandomPolicy(Policy):
    """What skips at random.

    Args:
        p_skip: the probability of skipping, in [0, 1].
    """

    learned = False
    draws = True

    def __init__(self, p_skip: float = 0.5):
        super().__init__()
        if not 0 <= p_skip <= 1:
            raise ValueError(f"p_skip is the probability of skipping, in [0, 1]; got {p_skip}")
        self.p_skip = float(p_skip)

    @classmethod
    def for_cells(cls, cells, p_skip=None):
        return cls(p_skip)

    def extra_repr(self) -> str:
        return f"p_skip={self.p_skip}"


class RandomSteps(RandomPolicy, StepPolicy):
    """Each step of each sequence is skipped with probability p_skip, in training and in test ([SKIP] section 4)."""

    name = "random_steps"
    label = "{}, random"
    about = "The baseline of Skip RNN (Campos et al., ICLR 2018): skips random steps, in use as in training."

    def draw(self, x, neurons):
        """u (B, T) in {0, 1}."""
        return (torch.rand(x.shape[:2], device=x.device) >= self.p_skip).to(x.dtype)

    def decide(self, gate, draw):
        return draw


class Skip(StepPolicy):
    """Skip RNN: the state tells how many steps to skip ([SKIP] equations 2 to 6).

    Carries q = update_prob (1 at the start) and s = cum_update_prob (0 at the start):
    u = round(s + min(q, 1 - s)); after an update q = sigmoid(w_p . top + b_p) and s = 0, else s accumulates.

    Args:
        hidden_size: H of the top layer.
        update_bias: initial value of b_p.
    """

    name = "skip"
    label = "Skip {}"
    about = "Skip RNN (Campos et al., ICLR 2018): has learned at which steps to update its state."
    learned = True
    gate_names = ("update_prob", "cum_update_prob")

    def __init__(self, hidden_size: int, update_bias: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))  # w_p
        self.bias = nn.Parameter(torch.empty(1))  # b_p; FSDP takes no scalars
        self.update_bias = update_bias
        self.reset_parameters()

    @classmethod
    def for_cells(cls, cells, p_skip=None):
        return cls(cells[-1].hidden_size)

    def reset_parameters(self) -> None:
        """Glorot uniform w_p, b_p at update_bias."""
        limit = (6 / (self.weight.numel() + 1)) ** 0.5
        nn.init.uniform_(self.weight, -limit, limit)
        nn.init.constant_(self.bias, self.update_bias)

    def start_open(self):
        """w_p = 0 and b_p = 1: q = 0.73 at every step."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        name = f"{prefix}bias"
        if name in state_dict and not state_dict[name].dim():  # as checkpoints had it that are older
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def initial_gate(self, batch_size):
        dtype = accumulated_in(self.weight.dtype)
        return self.weight.new_ones(batch_size, 1, dtype=dtype), self.weight.new_zeros(batch_size, 1, dtype=dtype)

    def decide(self, gate, draw):
        q, s = gate
        return s + torch.minimum(q, 1 - s)

    def after_update(self, gate, top):
        dtype = accumulated_in(top.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        q = torch.sigmoid(functional.linear(top.to(dtype), weight.unsqueeze(0), bias))
        return q, torch.zeros_like(q)

    def after_skip(self, gate, accumulated):
        return gate[0], accumulated

    def flops_per_update(self):
        return self.weight.numel()


class NeuronPolicy(Policy):
    """Decides per neuron; each layer reads the updated state of the layer below."""

    family = "neuron"

    @abstractmethod
    def decide(self, layer: int, x: Tensor, h: Tensor, draw: Tensor | None) -> Tensor:
        """Binary u (B, H) of one layer, from its input x (B, I) and its previous state h (B, H)."""


class RandomNeurons(RandomPolicy, NeuronPolicy):
    """SA-RNN's baseline "Random Updates": each neuron skips each step with probability p_skip, in test too."""

    name = "random_neurons"
    label = "{}, random"
    about = "The baseline of SA-RNN (Hartvigsen et al., CIKM 2020): random neurons skip each step."

    def draw(self, x, neurons):
        """u (B, T, N) in {0, 1}."""
        return (torch.rand(*x.shape[:2], neurons, device=x.device) >= self.p_skip).to(x.dtype)

    def decide(self, layer, x, h, draw):
        assert draw is not None
        return draw


class Coordinator(nn.Module):
    """One layer's coordinator of SA-RNN: diag(w_u) h + W_i x + b, initialised as torch.nn.Linear(I + H, H)."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.weight_input = nn.Parameter(torch.empty(hidden_size, input_size))  # W_i
        self.weight_state = nn.Parameter(torch.empty(hidden_size))  # w_u
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        limit = (self.weight_input.shape[1] + self.weight_state.numel()) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return functional.linear(x, self.weight_input, self.bias) + self.weight_state * h


class Selective(NeuronPolicy):
    """SA-RNN: each neuron updates where clamp((α a + 1) / 2, 0, 1) rounds to 1 ([SA] section 3, model.py).

    a = diag(w_u) h_{t-1} + W_i x_t + b; the slope α = min(5, 1 + 0.04 epoch) is annealed by epoch, and kept with the
    weights, because a checkpoint decides as it did when it was written.

    Args:
        sizes: (I, H) of every layer.
    """

    name = "selective"
    label = "SA-{}"
    about = "SA-RNN (Hartvigsen et al., CIKM 2020): has learned which neurons to update at each step."
    learned = True
    slope: Tensor

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        super().__init__()
        self.layers = nn.ModuleList(Coordinator(*size) for size in sizes)
        self.register_buffer("slope", torch.ones(()))

    @classmethod
    def for_cells(cls, cells, p_skip=None):
        return cls([(cell.input_size, cell.hidden_size) for cell in cells])

    @property
    def coordinators(self) -> list[Coordinator]:
        """One per layer."""
        return list(self.layers)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw the coordinators anew and start the annealing from epoch 0."""
        for coordinator in self.coordinators:
            coordinator.reset_parameters()
        self.set_epoch(0)

    def start_open(self):
        """a = 0.1 for every neuron, at every slope where the hard sigmoid has one."""
        for coordinator in self.coordinators:
            nn.init.zeros_(coordinator.weight_input)
            nn.init.zeros_(coordinator.weight_state)
            nn.init.constant_(coordinator.bias, 0.1)

    def set_epoch(self, epoch):
        self.slope.fill_(min(5.0, 1 + 0.04 * epoch))

    def decide(self, layer, x, h, draw):
        a = self.coordinators[layer](x, h)
        return straight_through_round(torch.clamp((a * self.slope + 1) / 2, 0, 1))

    def flops_per_step(self):
        return sum(c.weight_input.numel() + c.weight_state.numel() for c in self.coordinators)


class Policies(nn.ModuleList):
    """The policies of a network of several stacks, each with a gate of its own."""

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for policy in self:
            policy.reset_parameters()  # type: ignore[operator]

    def start_open(self) -> None:
        """Let all start where everything updates."""
        for policy in self:
            policy.start_open()  # type: ignore[operator]

    def set_epoch(self, epoch: int) -> None:
        """Tell all that training epoch `epoch` begins."""
        for policy in self:
            policy.set_epoch(epoch)  # type: ignore[operator]


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Always, RandomSteps, RandomNeurons, Skip, Selective)
}


def make_policy(name: str, cells: Sequence[Cell], p_skip: float | None = None) -> Policy:
    """The policy called `name`, for a stack of cells.

    Raises:
        ValueError: unknown name; p_skip missing, out of [0, 1], or given to a policy that draws nothing.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    kind = POLICIES[name]
    if kind.draws and p_skip is None:
        raise ValueError(f"policy {name} needs p_skip, the probability of skipping")
    if not kind.draws and p_skip is not None:
        raise ValueError(f"policy {name} has no p_skip: it draws nothing")
    return kind.for_cells(cells, p_skip)

"""When a state may be updated: the update policies of both papers.

A step policy decides once per step for the whole stack of layers, u of shape (B, 1); a neuron policy decides for every
neuron of every layer, u of shape (B, H). In both cases s_t = u_t * candidate + (1 - u_t) * s_{t-1}, and the gradient
passes straight through the rounding that makes u_t binary.

Shapes: B batch, T steps, I input, H hidden, N neurons of all layers together. Randomness comes from torch's generator.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from skiprnn.model.cells import Cell

Gate = tuple[Tensor, ...]  # what a step policy carries from step to step; (B, 1) each


class _StraightThroughRound(torch.autograd.Function):
    """round(x), half to even, with the gradient of the identity ([SKIP] section 3.1; _binary_round in the code)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def straight_through_round(x: Tensor) -> Tensor:
    """Round to 0 or 1, half to even, so that 0.5 is no update; du/dx = 1."""
    return _StraightThroughRound.apply(x)


class Policy(nn.Module):
    """Base of all policies."""

    per_neuron = False
    learned = False  # whether a budget λ on the updates can change what is learned

    def reset_parameters(self) -> None:
        """Draw the policy's parameters anew."""

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


class StepPolicy(Policy, ABC):
    """Decides per step; all layers update or copy together."""

    def initial_gate(self, batch_size: int) -> Gate:
        """The gate before the first step."""
        return ()

    @abstractmethod
    def decide(self, gate: Gate, draw: Tensor | None) -> Tensor | None:
        """The gate's value before rounding, (B, 1) in [0, 1]; None where every step updates."""

    def advance(self, gate: Gate, accumulated: Tensor, u: Tensor, top: Tensor) -> Gate:
        """The gate after the step, from the decision `u` and the last entry of the top layer's candidate (B, H)."""
        return gate


class Always(StepPolicy):
    """Every step updates: the plain LSTM and GRU."""

    def decide(self, gate, draw):
        return None


def _check_probability(p_skip: float) -> float:
    if not 0 <= p_skip <= 1:
        raise ValueError(f"p_skip is the probability of skipping, in [0, 1]; got {p_skip}")
    return float(p_skip)


class RandomSteps(StepPolicy):
    """Each step of each sequence is skipped with probability p_skip, in training and in test ([SKIP] section 4)."""

    def __init__(self, p_skip: float = 0.5):
        super().__init__()
        self.p_skip = _check_probability(p_skip)

    def draw(self, x, neurons):
        """u (B, T) in {0, 1}."""
        return (torch.rand(x.shape[:2], device=x.device) >= self.p_skip).to(x.dtype)

    def decide(self, gate, draw):
        return draw

    def extra_repr(self) -> str:
        return f"p_skip={self.p_skip}"


class Skip(StepPolicy):
    """Skip RNN: the state tells how many steps to skip ([SKIP] equations 2 to 6).

    Carries q = update_prob (1 at the start) and s = cum_update_prob (0 at the start):
    u = round(s + min(q, 1 - s)); after an update q = sigmoid(w_p . top + b_p) and s = 0, else s accumulates.

    Args:
        hidden_size: H of the top layer.
        update_bias: initial value of b_p.
    """

    learned = True

    def __init__(self, hidden_size: int, update_bias: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))  # w_p
        self.bias = nn.Parameter(torch.empty(()))  # b_p
        self.update_bias = update_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform w_p, b_p at update_bias."""
        limit = (6 / (self.weight.numel() + 1)) ** 0.5
        nn.init.uniform_(self.weight, -limit, limit)
        nn.init.constant_(self.bias, self.update_bias)

    def initial_gate(self, batch_size):
        return self.weight.new_ones(batch_size, 1), self.weight.new_zeros(batch_size, 1)

    def decide(self, gate, draw):
        q, s = gate
        return s + torch.minimum(q, 1 - s)

    def advance(self, gate, accumulated, u, top):
        q, _ = gate
        proposed = torch.sigmoid(functional.linear(top, self.weight.unsqueeze(0), self.bias))
        return u * proposed + (1 - u) * q, (1 - u) * accumulated

    def flops_per_update(self):
        return self.weight.numel()


class NeuronPolicy(Policy, ABC):
    """Decides per neuron; each layer reads the updated state of the layer below."""

    per_neuron = True

    @abstractmethod
    def decide(self, layer: int, x: Tensor, h: Tensor, draw: Tensor | None) -> Tensor:
        """Binary u (B, H) of one layer, from its input x (B, I) and its previous state h (B, H)."""


class RandomNeurons(NeuronPolicy):
    """SA-RNN's baseline "Random Updates": each neuron skips each step with probability p_skip, in test too."""

    def __init__(self, p_skip: float = 0.5):
        super().__init__()
        self.p_skip = _check_probability(p_skip)

    def draw(self, x, neurons):
        """u (B, T, N) in {0, 1}."""
        return (torch.rand(*x.shape[:2], neurons, device=x.device) >= self.p_skip).to(x.dtype)

    def decide(self, layer, x, h, draw):
        assert draw is not None
        return draw

    def extra_repr(self) -> str:
        return f"p_skip={self.p_skip}"


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

    learned = True
    slope: Tensor

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        super().__init__()
        self.layers = nn.ModuleList(Coordinator(*size) for size in sizes)
        self.register_buffer("slope", torch.ones(()))

    @property
    def coordinators(self) -> list[Coordinator]:
        """One per layer."""
        return list(self.layers)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw the coordinators anew and start the annealing from epoch 0."""
        for coordinator in self.coordinators:
            coordinator.reset_parameters()
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.slope.fill_(min(5.0, 1 + 0.04 * epoch))

    def decide(self, layer, x, h, draw):
        a = self.coordinators[layer](x, h)
        return straight_through_round(torch.clamp((a * self.slope + 1) / 2, 0, 1))

    def flops_per_step(self):
        return sum(c.weight_input.numel() + c.weight_state.numel() for c in self.coordinators)


def make_policy(name: str, cells: Sequence[Cell], p_skip: float | None = None) -> Policy:
    """The policy called `name`, for a stack of cells.

    Raises:
        ValueError: unknown name; p_skip missing, out of [0, 1], or given to a policy that draws nothing.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    if name in ("random_steps", "random_neurons"):
        if p_skip is None:
            raise ValueError(f"policy {name} needs p_skip, the probability of skipping")
        return RandomSteps(p_skip) if name == "random_steps" else RandomNeurons(p_skip)
    if p_skip is not None:
        raise ValueError(f"policy {name} has no p_skip; random_steps and random_neurons have")
    if name == "skip":
        return Skip(cells[-1].hidden_size)
    if name == "selective":
        return Selective([(cell.input_size, cell.hidden_size) for cell in cells])
    return Always()


POLICIES = ("always", "random_steps", "random_neurons", "skip", "selective")

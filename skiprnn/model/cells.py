"""How a state is computed from (state, input): one step of the LSTM and of the GRU, as in the Skip RNN authors' code.

Shapes: B batch, T steps, I input, H hidden, G gates. A cell's state is a tuple of (B, H) tensors, `h` first; its last
entry is what the Skip policy looks at (the cell state c of an LSTM, h of a GRU). Weights follow torch.nn.LSTM's layout,
(G*H, I) and (G*H, H), with the gates in the authors' order.

Source: src/rnn_cells/{basic_rnn_cells,skip_rnn_cells}.py of imatge-upc/skiprnn-2017-telecombcn. Their optional layer
normalisation, which no experiment of the papers uses, is the example of docs/extending.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, ...]


def reordered(weight: Tensor, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """A weight (G*H, ...) whose gates are in the order `given`, with them in the order `wanted`."""
    blocks = weight.chunk(len(given))
    return torch.cat([blocks[given.index(gate)] for gate in wanted])


class Cell(nn.Module, ABC):
    """What cells share: weights over [x, h] and an initial state. What a cell is, its class says.

    The fast engines know LSTMCell and GRUCell, no subclass of them: every other cell runs on the reference engine.

    Args:
        input_size: I.
        hidden_size: H.
        learn_initial_state: the initial state is one trainable vector per state entry, drawn from N(0, 1) and shared
            by the batch, as in the Skip RNN authors' code; otherwise zeros, as in SA-RNN's.
        bias: whether there is any, trained or constant.
    """

    name: ClassVar[str]  # in configs and records
    label: ClassVar[str]  # in tables and figures
    gates: ClassVar[tuple[str, ...]]  # G, in the order of the weights' blocks of H rows
    state_names: ClassVar[tuple[str, ...]]  # of the state's entries, "h" first
    initial_bias: ClassVar[tuple[float, ...]]  # per gate

    weight_ih: nn.Parameter  # (G*H, I)
    weight_hh: nn.Parameter  # (G*H, H)
    bias: Tensor  # (G*H,), a parameter; zeros if there is none

    def __init_subclass__(cls) -> None:
        if "forward" in vars(cls):  # the engines would not call it
            raise TypeError(f"{cls.__name__}: a cell's forward is step(project(x), state); override these")

    def __init__(self, input_size: int, hidden_size: int, learn_initial_state: bool = True, bias: bool = True):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(len(self.gates) * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(len(self.gates) * hidden_size, hidden_size))
        self.learn_initial_state, self.biased = learn_initial_state, bias
        if bias:
            self.bias = nn.Parameter(torch.empty(len(self.gates) * hidden_size))
        else:
            self.register_buffer("bias", torch.zeros(len(self.gates) * hidden_size), persistent=False)
        for name in self.state_names:
            if learn_initial_state:
                self.register_parameter(f"initial_{name}", nn.Parameter(torch.empty(hidden_size)))
            else:
                self.register_buffer(f"initial_{name}", torch.zeros(hidden_size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: Glorot uniform weights (as TensorFlow 1), constant biases, N(0, 1) states."""
        hidden = self.hidden_size
        for weight, columns in self._matrices():
            limit = math.sqrt(6 / (self.input_size + hidden + columns))
            for part in weight:
                nn.init.uniform_(part, -limit, limit)
        if self.biased:
            with torch.no_grad():
                self.bias.copy_(torch.tensor(self.initial_bias).repeat_interleave(hidden))
        if self.learn_initial_state:
            for initial in self.initial_state(1):
                nn.init.normal_(initial)

    def _matrices(self) -> list[tuple[tuple[Tensor, Tensor], int]]:
        """The matrices as (parts over x and over h, number of columns), for Glorot's fan-in + fan-out."""
        return [((self.weight_ih, self.weight_hh), len(self.gates) * self.hidden_size)]

    def initial_state(self, batch_size: int) -> State:
        """The state before the first step: (B, H) per entry, views of the one vector shared by the batch."""
        return tuple(getattr(self, f"initial_{name}").expand(batch_size, -1) for name in self.state_names)

    @property
    def total_bias(self) -> Tensor:
        """(G*H,): the bias, and what is added to it for good."""
        return self.bias

    def project(self, x: Tensor) -> Tensor:
        """The part of the pre-activations that depends on the input alone: (..., I) -> (..., G*H)."""
        return functional.linear(x, self.weight_ih, self.total_bias)

    @abstractmethod
    def step(self, projected: Tensor, state: State) -> State:
        """The candidate state from a projected input (B, G*H) and the previous state."""

    def forward(self, x: Tensor, state: State) -> State:
        """The candidate state from the input x (B, I) and the previous state."""
        return self.step(self.project(x), state)

    def flops_per_update(self) -> int:
        """Multiplications of one update, as the papers count them ([SKIP] section 4): those with the weights."""
        return self.weight_ih.numel() + self.weight_hh.numel()


class LSTMCell(Cell):
    """LSTM; the forget gate's bias is the trained one, which starts at 0, plus 1.

    c~ = c * sigmoid(f) + sigmoid(i) * tanh(j);  h~ = tanh(c~) * sigmoid(o)    (BasicLSTMCell)
    """

    name = "lstm"
    label = "LSTM"
    gates = ("i", "j", "f", "o")  # j: the candidate
    state_names = ("h", "c")
    initial_bias = (0.0, 0.0, 0.0, 0.0)
    forget_bias: Tensor  # (4*H,): 1 on f's rows

    def __init__(self, input_size: int, hidden_size: int, learn_initial_state: bool = True, bias: bool = True):
        super().__init__(input_size, hidden_size, learn_initial_state, bias)
        added = torch.tensor([float(bias and gate == "f") for gate in self.gates]).repeat_interleave(hidden_size)
        self.register_buffer("forget_bias", added, persistent=False)

    @property
    def total_bias(self):
        return self.bias + self.forget_bias

    def step(self, projected, state):
        h, c = state
        i, j, f, o = (projected + functional.linear(h, self.weight_hh)).chunk(4, dim=-1)
        c = c * torch.sigmoid(f) + torch.sigmoid(i) * torch.tanh(j)
        return torch.tanh(c) * torch.sigmoid(o), c


class GRUCell(Cell):
    """The original GRU: the reset gate r acts before the product (torch: after it).

    candidate = tanh(W [x, r * h] + b);  h~ = z * h + (1 - z) * candidate    (BasicGRUCell)
    """

    name = "gru"
    label = "GRU"
    gates = ("r", "z", "candidate")
    state_names = ("h",)
    initial_bias = (1.0, 1.0, 0.0)

    def _matrices(self):
        gate_rows = 2 * self.hidden_size
        return [
            ((self.weight_ih[:gate_rows], self.weight_hh[:gate_rows]), 2 * self.hidden_size),
            ((self.weight_ih[gate_rows:], self.weight_hh[gate_rows:]), self.hidden_size),
        ]

    def step(self, projected, state):
        (h,) = state
        gate_rows = 2 * self.hidden_size
        gate_inputs, candidate_input = projected.split([gate_rows, self.hidden_size], dim=-1)
        r, z = torch.sigmoid(gate_inputs + functional.linear(h, self.weight_hh[:gate_rows])).chunk(2, dim=-1)
        candidate = torch.tanh(candidate_input + functional.linear(r * h, self.weight_hh[gate_rows:]))
        return (z * h + (1 - z) * candidate,)


CELLS: dict[str, type[Cell]] = {cell.name: cell for cell in (LSTMCell, GRUCell)}

"""How a state is computed from (state, input): one step of the LSTM and of the GRU, as in the Skip RNN authors' code.

Shapes: B batch, T steps, I input, H hidden, G gates. A cell's state is a tuple of (B, H) tensors, `h` first; its last
entry is what the Skip policy looks at (the cell state c of an LSTM, h of a GRU). Weights follow torch.nn.LSTM's layout,
(G*H, I) and (G*H, H), with the gates in the authors' order.

Source: src/rnn_cells/{basic_rnn_cells,skip_rnn_cells,rnn_ops}.py of imatge-upc/skiprnn-2017-telecombcn.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, ...]

LAYER_NORM_EPSILON = 1e-3  # added to the standard deviation, not to the variance


class Cell(nn.Module, ABC):
    """What LSTM and GRU share: weights over [x, h], initial state, optional layer normalisation.

    Args:
        input_size: I.
        hidden_size: H.
        layer_norm: normalise the pre-activation of each gate over its H units (gain, bias).
        learn_initial_state: the initial state is one trainable vector per state entry, drawn from N(0, 1) and shared
            by the batch, as in the Skip RNN authors' code; otherwise zeros, as in SA-RNN's.
    """

    gates: ClassVar[int]  # G, matrix products of size (I + H) x H per step: the FLOPs of a step follow from it
    normalised_gates: ClassVar[int]  # the leading gates that layer normalisation applies to
    state_names: ClassVar[tuple[str, ...]]
    initial_bias: ClassVar[tuple[float, ...]]  # per gate

    weight_ih: nn.Parameter  # (G*H, I)
    weight_hh: nn.Parameter  # (G*H, H)
    bias: nn.Parameter  # (G*H,)

    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool = False, learn_initial_state: bool = True):
        super().__init__()
        self.input_size, self.hidden_size, self.layer_norm = input_size, hidden_size, layer_norm
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(self.gates * hidden_size))
        if layer_norm:
            self.norm_gain = nn.Parameter(torch.empty(self.normalised_gates, hidden_size))
            self.norm_bias = nn.Parameter(torch.empty(self.normalised_gates, hidden_size))
        self.learn_initial_state = learn_initial_state
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
        with torch.no_grad():
            self.bias.copy_(torch.tensor(self.initial_bias).repeat_interleave(hidden))
        if self.layer_norm:
            nn.init.ones_(self.norm_gain)
            nn.init.zeros_(self.norm_bias)
        if self.learn_initial_state:
            for initial in self.initial_state(1):
                nn.init.normal_(initial)

    @abstractmethod
    def _matrices(self) -> list[tuple[tuple[Tensor, Tensor], int]]:
        """The authors' matrices as (parts over x and over h, number of columns), for Glorot's fan-in + fan-out."""

    def initial_state(self, batch_size: int) -> State:
        """The state before the first step: (B, H) per entry, views of the one vector shared by the batch."""
        return tuple(getattr(self, f"initial_{name}").expand(batch_size, -1) for name in self.state_names)

    def project(self, x: Tensor) -> Tensor:
        """The part of the pre-activations that depends on the input alone: (..., I) -> (..., G*H)."""
        return functional.linear(x, self.weight_ih, self.bias)

    @abstractmethod
    def step(self, projected: Tensor, state: State) -> State:
        """The candidate state from a projected input (B, G*H) and the previous state."""

    def forward(self, x: Tensor, state: State) -> State:
        """The candidate state from the input x (B, I) and the previous state."""
        return self.step(self.project(x), state)

    def _normalise(self, gate: int, preactivation: Tensor) -> Tensor:
        """Layer normalisation of one gate's pre-activation (B, H), if the cell has it (rnn_ops.layer_norm)."""
        if not self.layer_norm:
            return preactivation
        centred = preactivation - preactivation.mean(-1, keepdim=True)
        # a norm, not the root of a mean of squares: its gradient is 0, not nan, where all units are equal
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(centred.shape[-1])
        return self.norm_gain[gate] * centred / (deviation + LAYER_NORM_EPSILON) + self.norm_bias[gate]


class LSTMCell(Cell):
    """LSTM with gates in the order i, j (candidate), f, o; the forget bias is added on top of a zero-initialised bias.

    c~ = c * sigmoid(f + 1) + sigmoid(i) * tanh(j);  h~ = tanh(c~) * sigmoid(o)    (BasicLSTMCell)
    """

    gates = 4
    normalised_gates = 4
    state_names = ("h", "c")
    initial_bias = (0.0, 0.0, 0.0, 0.0)
    forget_bias = 1.0

    def _matrices(self):
        return [((self.weight_ih, self.weight_hh), 4 * self.hidden_size)]

    def step(self, projected, state):
        h, c = state
        preactivations = projected + functional.linear(h, self.weight_hh)
        i, j, f, o = (self._normalise(gate, a) for gate, a in enumerate(preactivations.chunk(4, dim=-1)))
        c = c * torch.sigmoid(f + self.forget_bias) + torch.sigmoid(i) * torch.tanh(j)
        return torch.tanh(c) * torch.sigmoid(o), c


class GRUCell(Cell):
    """The original GRU: gates in the order r, z, candidate; the reset gate acts before the product (torch: after it).

    candidate = tanh(W [x, r * h] + b);  h~ = z * h + (1 - z) * candidate    (BasicGRUCell)
    """

    gates = 3
    normalised_gates = 2
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
        preactivations = gate_inputs + functional.linear(h, self.weight_hh[:gate_rows])
        r, z = (torch.sigmoid(self._normalise(gate, a)) for gate, a in enumerate(preactivations.chunk(2, dim=-1)))
        candidate = torch.tanh(candidate_input + functional.linear(r * h, self.weight_hh[gate_rows:]))
        return (z * h + (1 - z) * candidate,)


CELLS: dict[str, type[Cell]] = {"lstm": LSTMCell, "gru": GRUCell}

"""What is timed: networks whose update rate is forced, and a step of each.

w_p = 0 and a constant q give one update in n steps; "desynchronised" rows start at random s.
"""

from typing import Any

import torch
from torch import Tensor, nn

from skiprnn import Recurrent
from skiprnn.model.policies import Skip

SHAPES = {  # B, T, I, H, L
    "mnist": (256, 784, 1, 110, 1),
    "mnist, B=1": (1, 784, 1, 110, 1),
    "imdb": (256, 200, 300, 128, 1),
    "ucf101": (32, 250, 2048, 512, 2),
}
RATES = {1: "100 %", 2: "50 %", 10: "10 %"}
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU}  # what each cell is compared with


def skip_network(cell: str, shape, period: int, engine: str = "native") -> Recurrent:
    """A Skip RNN that updates at one step in `period`, whatever it reads."""
    _, _, inputs, hidden, layers = shape
    rnn = Recurrent(cell, "skip", inputs, hidden, layers, engine=engine, batch_first=True)
    assert isinstance(rnn.policy, Skip)
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.fill_(torch.logit(torch.tensor(0.9 if period == 1 else 0.5 / (period - 0.5))))
    return rnn


def desynchronised(rnn: Recurrent, batch: int) -> Any:
    """An initial state whose rows update at different times."""
    assert isinstance(rnn.policy, Skip)
    q = torch.sigmoid(rnn.policy.bias.detach()).expand(batch, 1)
    return rnn.pack([([cell.initial_state(batch) for cell in rnn.cells], (q, torch.rand(batch, 1) / 2))])


def train(rnn: Any, x: Tensor, scattered: bool = False) -> None:
    """Forward and backward of a classifier's loss on the last state; the input needs no gradient."""
    result = rnn(x, desynchronised(rnn, len(x))) if scattered else rnn(x)
    state = result[1]
    last = state[0] if isinstance(state, tuple) else state
    loss = last[-1].square().sum()
    if len(result) == 3 and result[2].requires_grad:
        loss = loss + 1e-4 * result[2].sum()
    loss.backward()
    rnn.zero_grad(set_to_none=True)


@torch.no_grad()
def infer(rnn: Any, x: Tensor, scattered: bool = False) -> None:
    rnn(x, desynchronised(rnn, len(x))) if scattered else rnn(x)

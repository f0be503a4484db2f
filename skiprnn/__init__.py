"""Recurrent networks that decide when to compute: Skip RNN (Campos et al. 2018, [SKIP]) and SA-RNN (Hartvigsen et al.
2020, [SA]), in place of torch.nn.LSTM.

Shapes: B batch, T steps, I input, H hidden, L layers, D directions, which are 2 if bidirectional, else 1.
"""

from skiprnn.model.recurrent import (
    GRU,
    LSTM,
    SAGRU,
    SALSTM,
    RandomSkipGRU,
    RandomSkipLSTM,
    Recurrent,
    SkipGRU,
    SkipLSTM,
)
from skiprnn.model.state import GatedState

__all__ = [
    "GRU",
    "LSTM",
    "SAGRU",
    "SALSTM",
    "GatedState",
    "RandomSkipGRU",
    "RandomSkipLSTM",
    "Recurrent",
    "SkipGRU",
    "SkipLSTM",
]
__version__ = "0.1.0"

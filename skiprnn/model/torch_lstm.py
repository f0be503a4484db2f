"""Weights between our LSTMs and torch.nn.LSTM."""

from typing import Any

import torch
from torch import nn

from skiprnn.model.cells import LSTMCell, reordered

GATES = ("i", "f", "j", "o")  # of torch.nn.LSTM's rows; it calls j g


def from_torch(kind, lstm: nn.LSTM, options: dict[str, Any]):
    """See the method of this name, of the class `kind`."""
    if kind.cell_and_policy[0] != "lstm":
        raise ValueError(
            f"{kind.__name__} cannot take weights from torch: the papers' GRU resets the state before the product, "
            "torch.nn.GRU after it, so no weights make them equal"
        )
    if not isinstance(lstm, nn.LSTM):
        raise ValueError(f"from_torch takes a torch.nn.LSTM; got {type(lstm).__name__}")
    if lstm.proj_size:
        raise ValueError(f"{kind.__name__} has no proj_size; the torch.nn.LSTM has proj_size={lstm.proj_size}")
    fixed = {"bias": lstm.bias, "bidirectional": lstm.bidirectional}
    if any(options.get(name, value) != value for name, value in fixed.items()):
        raise ValueError("bias and bidirectional are the torch.nn.LSTM's: leave them out")
    weight = next(lstm.parameters())
    like: dict[str, Any] = {"learn_initial_state": False, "dropout": lstm.dropout, "batch_first": lstm.batch_first}
    like |= {"device": weight.device, "dtype": weight.dtype}
    rnn = kind(lstm.input_size, lstm.hidden_size, lstm.num_layers, **like | fixed | options)
    with torch.no_grad():
        for cell, theirs in zip(rnn.cells, lstm.all_weights, strict=True):
            weight_ih, weight_hh, *biases = (reordered(weight, GATES, cell.gates) for weight in theirs)
            cell.weight_ih.copy_(weight_ih)
            cell.weight_hh.copy_(weight_hh)
            if biases:
                both = biases[0] + biases[1]
                cell.bias.add_(both.to(cell.bias) - cell.total_bias)  # which has what is added for good
            for initial in cell.initial_state(1):
                initial.zero_()
        rnn.policy.start_open()
    return rnn


def to_torch(rnn) -> nn.LSTM:
    """See the method of this name."""
    if any(initial.any() for cell in rnn.cells for initial in cell.initial_state(1)):
        raise ValueError("torch.nn.LSTM begins with zeros: only an LSTM with learn_initial_state=False becomes one")
    if not isinstance(rnn.hidden_size, int):
        raise ValueError(f"torch.nn.LSTM has one hidden size; the layers have {list(rnn.hidden_size)}")
    options = {name: getattr(rnn, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
    weight = rnn.cells[0].weight_ih
    options |= {"device": weight.device, "dtype": weight.dtype}
    lstm = nn.LSTM(rnn.input_size, rnn.hidden_size, rnn.num_layers, **options)
    with torch.no_grad():
        for cell, theirs in zip(rnn.cells, lstm.all_weights, strict=True):
            ours = cell.weight_ih, cell.weight_hh, cell.total_bias, torch.zeros_like(cell.total_bias)
            for into, weight in zip(theirs, ours, strict=False):
                into.copy_(reordered(weight, LSTMCell.gates, GATES))
    return lstm

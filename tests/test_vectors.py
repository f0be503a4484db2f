"""Outputs, update gates, loss and every gradient against vectors computed with the authors' own code.

SKIPRNN_VECTORS names the folder; any number of subfolders, any sizes. See reference facts in README.md.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import triton_kernels
from torch.nn import functional

from skiprnn import Recurrent

FOLDER = os.environ.get("SKIPRNN_VECTORS")
FILES = sorted(Path(FOLDER).rglob("*.npz")) if FOLDER else []
TOLERANCE = 1e-4
CELL_AND_POLICY = {
    "BasicLSTM": ("lstm", "always"),
    "BasicGRU": ("gru", "always"),
    "SkipLSTM": ("lstm", "skip"),
    "SkipGRU": ("gru", "skip"),
    "MultiSkipLSTM": ("lstm", "skip"),
    "MultiSkipGRU": ("gru", "skip"),
}

pytestmark = pytest.mark.skipif(not FILES, reason="SKIPRNN_VECTORS names no folder with the authors' test vectors")


def assert_close(actual: torch.Tensor, expected: np.ndarray, name: str) -> None:
    """Relative error in the largest element's scale, so that a gradient of small elements is judged as a whole."""
    expected = torch.from_numpy(np.asarray(expected, dtype=np.float32)).reshape(actual.shape)
    error = (actual.detach().cpu() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


class Variables:
    """Maps the authors' variables onto parameters: load values into them, and compare gradients in the same layout."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.pairs: list[tuple[str, callable, callable]] = []
        self.seen = set()

    def add(self, name: str, view) -> None:
        """`view(which)` gives the list of (parameter slice) blocks; see below."""
        self.seen.add(name)
        self.pairs.append((name, view))

    def load(self) -> None:
        for name, blocks in self.pairs:
            value = torch.from_numpy(self.arrays[f"var.{name}"])
            for parameter, index, region in blocks:
                with torch.no_grad():
                    parameter[index].copy_(region(value).reshape(parameter[index].shape))

    def check(self) -> None:
        assert self.seen == {key[4:] for key in self.arrays if key.startswith("var.")}, "a variable was left out"
        for name, blocks in self.pairs:
            gradient = torch.from_numpy(self.arrays[f"grad.{name}"])
            ours = torch.cat([parameter.grad[index].reshape(-1) for parameter, index, _ in blocks])
            theirs = torch.cat([region(gradient).reshape(-1) for _, _, region in blocks])
            assert_close(ours, theirs.numpy(), f"gradient of {name}")


ALL = (Ellipsis,)


def tensorflow_matrix(cell, rows: slice):
    """Blocks of a TensorFlow matrix (I + H, columns): its first I rows are weight_ih, the rest weight_hh."""
    size = cell.input_size
    return [
        (cell.weight_ih, rows, lambda m: m[:size].T),
        (cell.weight_hh, rows, lambda m: m[size:].T),
    ]


def skip_variables(kind: str, arrays, rnn: Recurrent) -> Variables:
    variables = Variables(arrays)
    stacked = kind.startswith("Multi")
    scope = f"rnn.{kind}Cell."
    for layer, cell in enumerate(rnn.cells, start=1):
        prefix = f"layer_{layer}." if stacked else ""
        for name in cell.state_names:
            parameter = getattr(cell, f"initial_{name}")
            variables.add(f"{prefix}initial_{name}.initial_state", [(parameter, ALL, lambda v: v)])
        two = 2 * cell.hidden_size
        parts = {"": slice(None)} if len(cell.gates) == 4 else {"gates.": slice(0, two), "candidate.": slice(two, None)}
        for part, rows in parts.items():
            variables.add(f"{scope}{prefix}{part}Weights", tensorflow_matrix(cell, rows))
            variables.add(f"{scope}{prefix}{part}Biases", [(cell.bias, rows, lambda v: v)])
    if rnn.policy.learned:
        variables.add(f"{scope}state_update_prob.Weights", [(rnn.policy.weight, ALL, lambda v: v)])
        variables.add(f"{scope}state_update_prob.Biases", [(rnn.policy.bias, ALL, lambda v: v)])
    return variables


def selective_variables(arrays, rnn: Recurrent, out: torch.nn.Linear) -> Variables:
    variables = Variables(arrays)
    cell, coordinator = rnn.cells[0], rnn.policy.coordinators[0]
    inputs, hidden = cell.input_size, cell.hidden_size
    for gate, name in enumerate(["r", "z", "h"]):
        rows = slice(gate * hidden, (gate + 1) * hidden)
        variables.add(
            f"{name}.weight",
            [(cell.weight_ih, rows, lambda m: m[:, :inputs]), (cell.weight_hh, rows, lambda m: m[:, inputs:])],
        )
        variables.add(f"{name}.bias", [(cell.bias, rows, lambda v: v)])
    variables.add(
        "fc1.weight",
        [
            (coordinator.weight_state, ALL, lambda m: m[:, :hidden].diagonal()),
            (coordinator.weight_input, ALL, lambda m: m[:, hidden:]),
        ],
    )
    variables.add("fc1.bias", [(coordinator.bias, ALL, lambda v: v)])
    variables.add("out.weight", [(out.weight, ALL, lambda m: m)])
    variables.add("out.bias", [(out.bias, ALL, lambda v: v)])
    return variables


@pytest.mark.parametrize("engine", ["reference", "native", "triton"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_agrees_with_the_authors_code(file, engine):
    device = "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"
    with torch.device(device), triton_kernels() if engine == "triton" else nullcontext():
        check(file, engine, device)


def check(file: Path, engine: str, device: str) -> None:
    """Raises AssertionError unless everything in the file is what the engine computes on the device."""
    arrays = dict(np.load(file))
    kind = file.stem.split("_")[0]
    cost = float(arrays["lambda"])
    x = torch.from_numpy(arrays["x"]).to(device)
    if kind == "SARNN":
        x = x.transpose(0, 1).contiguous()
        hidden = arrays["var.z.bias"].size
        rnn = Recurrent(
            "gru", "selective", x.shape[2], hidden, learn_initial_state=False, engine=engine, batch_first=True
        )
        out = torch.nn.Linear(hidden, arrays["var.out.bias"].size)
        variables = selective_variables(arrays, rnn, out)
        variables.load()
        rnn.policy.set_epoch(int(arrays["epoch"]))
        assert rnn.policy.slope.item() == pytest.approx(float(arrays["slope"]), rel=1e-6)
        _, h, updates = rnn(x)
        logits = out(h[-1])
        assert_close(logits, arrays["logits"], "logits")
        loss = (
            functional.cross_entropy(logits, torch.from_numpy(arrays["labels"]).to(device))
            + cost * updates.sum(1).mean()
        )
        expected_updates = arrays["u"]
    else:
        cell, policy = CELL_AND_POLICY[kind]
        sizes = [v.size for k, v in sorted(arrays.items()) if k.startswith("var.") and "initial_h" in k]
        rnn = Recurrent(cell, policy, x.shape[2], sizes, len(sizes), engine=engine, batch_first=True)
        variables = skip_variables(kind, arrays, rnn)
        variables.load()
        output, _, updates = rnn(x)
        assert_close(output, arrays["h"], "outputs")
        loss = (output * torch.from_numpy(arrays["loss_weight"]).to(device)).sum((1, 2)).mean()
        if policy == "skip":
            loss = loss + cost * updates.sum(1).mean()
        expected_updates = arrays["u"][..., 0] if "u" in arrays else np.ones(x.shape[:2], dtype=np.float32)
    assert np.array_equal(updates.detach().cpu().numpy(), expected_updates), "update gates differ"
    loss.backward()
    assert_close(loss, arrays["loss"], "loss")
    variables.check()

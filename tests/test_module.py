"""Arguments of torch.nn.LSTM that change what is computed: directions, dropout, biases; and precision."""

import re
from pathlib import Path

import pytest
import torch
from conftest import entries
from test_recurrent import (
    NETWORKS,
    B,
    H,
    I,
    T,
    every_depth,
    every_network,
    is_lstm,
    is_per_neuron,
    lively,
    make,
    sequences,
    skip_alone,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from skiprnn import LSTM, SAGRU, SALSTM, RandomSkipLSTM, Recurrent, SkipGRU, SkipLSTM

ROOT = Path(__file__).resolve().parent.parent

# two directions


@every_network
@every_depth
def test_two_directions_are_networks_of_their_own(network, layers):
    """By layer and sequence: one network forwards, one on the reversed steps, their outputs side by side."""
    rnn = make(network, layers, bidirectional=True)
    x, lengths = sequences(), [T, 3, 1, 6]
    draws = [policy.draw(x, H) for policy in rnn.policy]
    parts = []
    for number, (cell, policy) in enumerate(zip(rnn.cells, rnn.policy, strict=True)):
        policy.draw = lambda x, neurons, number=number: draws[number]
        parts.append(make(network, 1) if cell.input_size == I else lively(network(2 * H, H).double()))
        parts[-1].batch_first = True
        parts[-1].cells[0].load_state_dict(cell.state_dict())
        parts[-1].policy.load_state_dict(policy.state_dict())
    output, state, updates = rnn(x, lengths=lengths)
    assert output.shape == (B, T, 2 * H)
    assert updates.shape == (B, T, 2 * layers * (H if is_per_neuron(network) else 1))
    for b, steps in enumerate(lengths):
        below, last, decisions = x[b : b + 1, :steps], [], []
        for layer in range(layers):
            outputs = []
            for direction in (0, 1):
                number = 2 * layer + direction
                draw = None if draws[number] is None else draws[number][b : b + 1, :steps]
                parts[number].policy.draw = lambda x, neurons, draw=draw: draw
                one, after, u = parts[number](below.flip(1) if direction else below)
                outputs.append(one.flip(1) if direction else one)
                decisions.append(u.flip(1) if direction else u)
                last.append(entries(after))
            below = torch.cat(outputs, 2)
        torch.testing.assert_close(output[b, :steps], below[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(output[b, steps:], output[b, steps - 1].expand(T - steps, 2 * H))
        expected = torch.cat(decisions, 2) if is_per_neuron(network) else torch.stack(decisions, 2)
        assert torch.equal(updates[b, :steps], expected[0])
        assert not updates[b, steps:].any()
        h = torch.stack([one[0][0, 0] for one in last])
        torch.testing.assert_close(entries(state)[0][:, b], h, rtol=1e-12, atol=1e-12)
        gates = [part[0] for one in last for part in one[1 + is_lstm(network) :]]
        ours = [part[b] for part in entries(state)[1 + is_lstm(network) :]]
        torch.testing.assert_close(ours, gates, rtol=1e-12, atol=1e-12)


@every_network
def test_two_directions_are_learned_and_decide_apart(network):
    rnn = make(network, 2, bidirectional=True)
    x = sequences(steps=12).requires_grad_()
    output, _, updates = rnn(x)
    (output.square().sum() + (updates.sum() if updates.requires_grad else 0)).backward()
    for name, parameter in rnn.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().sum(0).min() > 0
    if network.__name__ not in ("LSTM", "GRU"):
        assert not torch.equal(updates[..., 0], updates[..., -1])


@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_both_gates_ride_along(network):
    rnn = make(network, 2, bidirectional=True)
    x = sequences(steps=5)
    state = rnn(x)[1]
    *_, gates = entries(state)[:-8], entries(state)[-8:]
    assert len(gates) == len((state[0] if is_lstm(network) else state).gate_state) == 2 * 2 * 2
    expected = rnn(x, state)
    plain = tuple(entries(state)[: 1 + is_lstm(network)])
    plain = (plain[0] * 1, *plain[1:])
    assert torch.equal(rnn(x, (*plain, *gates))[2], expected[2])
    assert not torch.equal(rnn(x, plain)[2], expected[2])
    one = rnn.cells[1], rnn.policy[1]  # the first layer's other direction begins where it ended
    alone = make(network, 1)
    alone.cells[0].load_state_dict(one[0].state_dict())
    alone.policy.load_state_dict(one[1].state_dict())
    begin = [part[1:2] for part in plain] + list(gates[2:4])
    assert torch.equal(alone(x.flip(1), begin)[2].flip(1), expected[2][..., 1])


def test_what_needs_one_direction_says_so():
    rnn = SkipLSTM(I, H, bidirectional=True)
    with pytest.raises(ValueError, match="a stream goes forwards"):
        rnn.stream()
    with pytest.raises(ValueError, match="several stacks"):
        rnn.prepare(torch.zeros(T, B, I))


@pytest.mark.parametrize("network", [SAGRU])
def test_all_policies_are_told_the_epoch_and_drawn_anew(network):
    rnn = network(I, H, 2, bidirectional=True)
    rnn.policy.set_epoch(25)
    assert {policy.slope.item() for policy in rnn.policy} == {2.0}
    weight = rnn.policy[3].layers[0].weight_state.clone()
    rnn.reset_parameters()
    assert {policy.slope.item() for policy in rnn.policy} == {1.0}
    assert not torch.equal(weight, rnn.policy[3].layers[0].weight_state)


# dropout


@pytest.mark.parametrize(
    ("network", "engine"),
    [*((network, engine) for network in NETWORKS for engine in ("auto", "reference")), (RandomSkipLSTM, "compact")],
)
def test_dropout_is_what_the_next_layer_reads(network, engine):
    """Against a chain of single layers, and for a gate that ties them an independent loop."""
    rnn = make(network, 2, dropout=0.5, engine=engine)
    x = sequences(steps=12)
    draw = rnn.policy.draw(x, 2 * H)
    rnn.policy.draw = lambda x, neurons: draw
    torch.manual_seed(7)
    output, _, updates = rnn(x)
    torch.manual_seed(7)
    mask = functional.dropout(x.new_ones(B, 12, H), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    if network.__name__.startswith("Skip"):
        alone = [skip_alone(rnn, one, [its]) for one, its in zip(x, mask, strict=True)]
        expected, decisions = (torch.stack(parts) for parts in zip(*alone, strict=True))
        assert torch.equal(updates, decisions)
    else:
        below = x
        for layer, cell in enumerate(rnn.cells):
            part = make(network, 1) if not layer else lively(network(H, H, batch_first=True).double())
            part.cells[0].load_state_dict(cell.state_dict())
            if hasattr(rnn.policy, "coordinators"):
                part.policy.coordinators[0].load_state_dict(rnn.policy.coordinators[layer].state_dict())
            own = draw if draw is None or draw.dim() == 2 else draw[..., layer * H : (layer + 1) * H]
            part.policy.draw = lambda x, neurons, own=own: own
            expected = part(below)[0]
            below = expected * mask
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(output, rnn(x)[0])
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.dropout = 0.0
    evaluated = rnn.eval()(x)[0]
    torch.testing.assert_close(rnn.train()(x)[0], evaluated, rtol=1e-12, atol=1e-12)


@every_network
def test_dropout_has_gradients(network):
    rnn = make(network, 2, dropout=0.5, bidirectional=network is SkipGRU)
    rnn(sequences())[0].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in rnn.parameters() if parameter.grad is not None)
    assert rnn.cells[0].weight_ih.grad.abs().max() > 0
    rnn.dropout = 1.0  # nothing of the first layer reaches the second
    rnn.zero_grad()
    rnn(sequences())[0].square().sum().backward()
    assert not rnn.cells[0].weight_ih.grad.any()
    assert rnn.cells[-1].weight_hh.grad.any()


def test_dropout_keeps_what_it_says():
    rnn = LSTM(1, 200, 2, dropout=0.3, batch_first=True)
    torch.manual_seed(0)
    (stack,), (states, gate) = rnn.blocks[0], rnn.unpack(None, 20)[0]
    (mask,) = rnn._call(stack, torch.zeros(20, 50, 1), None, states, gate, True).masks
    assert (mask == 0).double().mean() == pytest.approx(0.3, abs=0.01)
    assert mask.mean() == pytest.approx(1, abs=0.02)


def test_a_shared_gate_with_dropout_takes_the_reference_engine():
    rnn, x = SkipLSTM(I, H, 2, dropout=0.5), torch.zeros(B, T, I)
    assert rnn.engine_for(x) == "reference"
    assert rnn.eval().engine_for(x) != "reference"
    rnn = SkipLSTM(I, H, 2, dropout=0.5, engine="native")
    with pytest.raises(ValueError, match="no dropout between layers that share a gate"):
        rnn(x.transpose(0, 1))


def test_arguments_out_of_range_are_named():
    with pytest.warns(UserWarning, match="dropout acts between layers: with num_layers=1"):
        SkipLSTM(I, H, dropout=0.5)
    for wrong in (1.5, -0.1, True, "0.5", None):
        with pytest.raises(ValueError, match="dropout is the probability of zeroing an output"):
            SkipLSTM(I, H, 2, dropout=wrong)
    with pytest.raises(ValueError, match="proj_size=2: the papers' cells have no projection"):
        SkipLSTM(I, H, proj_size=2)
    assert SkipLSTM(I, H, proj_size=0).bias


# biases


@every_network
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_without_biases_nothing_is_added(network, engine):
    rnn = make(network, 2, bias=False, engine=engine)
    assert not any(name.endswith(".bias") and name.startswith("layers") for name in rnn.state_dict())
    full = make(network, 2, engine=engine)
    full.load_state_dict(rnn.state_dict(), strict=False)
    with torch.no_grad():
        for cell in full.cells:
            cell.bias.copy_(cell.bias - cell.total_bias)
    x = sequences()
    draw = rnn.policy.draw(x, 2 * H)
    for one in (rnn, full):
        one.policy.draw = lambda x, neurons: draw
    torch.testing.assert_close(rnn(x)[0], full(x)[0], rtol=1e-12, atol=1e-12)
    rnn.reset_parameters()
    assert not any(cell.total_bias.any() for cell in rnn.cells)


# precision


@every_network
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_under_autocast_the_recurrence_keeps_its_precision(network, low, engine):
    """x and the output are rounded, as torch.nn.LSTM's are; what is added up over the steps is not."""
    torch.manual_seed(0)
    rnn, linear, x = lively(network(I, H, 2, engine=engine)), nn.Linear(I, I), torch.randn(T, B, I)
    draw = rnn.policy.draw(x.transpose(0, 1), 2 * H)
    rnn.policy.draw = lambda x, neurons: draw
    with torch.autocast("cpu", low):
        read = linear(x)
        output, state, updates = rnn(read)
        (output.float().square().mean() + (updates.mean() if updates.requires_grad else 0)).backward()
        continued = rnn(read, tuple(part.to(low) for part in entries(state)[: 1 + is_lstm(network)]))[0]
        assert rnn(x)[0].dtype == low
    assert read.dtype == output.dtype == continued.dtype == low == torch_output(low).dtype
    assert {part.dtype for part in (updates, *entries(state))} == {torch.float32}
    expected, their_state, their_updates = rnn(read.float())
    assert torch.equal(output, expected.to(low))
    assert torch.equal(updates, their_updates)
    assert all(torch.equal(*pair) for pair in zip(entries(state), entries(their_state), strict=True))
    assert {parameter.grad.dtype for parameter in [*rnn.parameters(), *linear.parameters()]} == {torch.float32}
    assert linear.weight.grad.isfinite().all()
    assert linear.weight.grad.any()


def torch_output(low: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", low):
        return nn.LSTM(I, H)(torch.zeros(T, B, I, dtype=low))[0]


def share_that_differs(rnn: Recurrent, low) -> float:
    """The share of update decisions that differ from float32's, of 64 sequences of 200 steps."""
    linear, x = nn.Linear(8, 8), torch.randn(200, 64, 8)
    with torch.no_grad():
        expected = rnn(linear(x))[2]
        with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
            read = linear(x)
            updates = rnn(read)[2] if low == "autocast" else rnn.bfloat16()(read.bfloat16())[2]
    assert 0.1 < expected.mean() < 0.9
    return (updates != expected).float().mean().item()


@pytest.mark.parametrize(
    ("network", "autocast", "bfloat16"), [(SkipLSTM, 0.05, 0.15), (SkipGRU, 0.05, 0.15), (SAGRU, 2e-3, 0.03)]
)
def test_decisions_that_differ_in_low_precision_are_few(network, autocast, bfloat16):
    """The shares that docs/module.md states."""
    for seed in range(2):
        torch.manual_seed(seed)
        rnn = network(8, 64)
        if network is not SAGRU:
            with torch.no_grad():
                rnn.policy.weight.mul_(3)
                rnn.policy.bias.fill_(-2.0)
        assert 0 < share_that_differs(rnn, "autocast") <= autocast
        assert autocast < share_that_differs(rnn, "bfloat16") <= bfloat16


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_the_gate_adds_up_in_float32(network, low, learning):
    """Increments of 1/1024, which bfloat16 would lose from a quarter on, exceed a half after 513 steps."""
    rnn = network(I, H, dtype=low)
    with torch.no_grad():
        rnn.policy.weight.zero_()
    rnn.policy.after_update = lambda gate, top: (torch.full_like(gate[0], 1 / 1024), torch.zeros_like(gate[1]))
    with torch.set_grad_enabled(learning):
        output, state, updates = rnn(torch.zeros(1030, 1, I, dtype=low))
    assert output.dtype == low
    assert [part.dtype for part in entries(state)[-2:]] == [torch.float32] * 2
    assert updates.dtype == torch.float32  # a sum of bfloat16 is right up to 256
    assert updates[:, 0].nonzero().flatten().tolist() == [0, 513, 1026]


@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_continues(network, dtype):
    torch.manual_seed(0)
    rnn = lively(network(I, H, 2)).to(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    draw = rnn.policy.draw(x.transpose(0, 1), 2 * H)
    rnn.policy.draw = lambda x, neurons: None if draw is None else draw[:, : x.shape[1]].to(x.dtype)
    output, state, _ = rnn(x)
    assert output.dtype == entries(state)[0].dtype == dtype
    output.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in rnn.parameters() if parameter.grad is not None} == {dtype}
    with torch.no_grad():
        exact = rnn.float()(x.float())[0]
    close = (output.float() - exact).abs() < 0.05
    assert close.float().mean() > 0.6  # a decision that differs changes what follows
    if draw is not None:
        return
    rnn = rnn.to(dtype)
    first, middle, _ = rnn(x[:4])
    assert torch.equal(torch.cat([first, rnn(x[4:], middle)[0]]), output)


def test_lightnings_mixed_precision_trains():
    lightning = pytest.importorskip("pytorch_lightning")

    class Model(lightning.LightningModule):
        """Whether the first sample was positive, from the last state."""

        def __init__(self):
            super().__init__()
            self.read, self.rnn, self.out = nn.Linear(1, 8), SkipLSTM(8, 16, batch_first=True), nn.Linear(16, 1)
            self.losses: list[float] = []

        def training_step(self, batch, _):
            x, y = batch
            _, (h, _), updates = self.rnn(self.read(x))
            assert self.read(x).dtype == torch.bfloat16
            loss = functional.binary_cross_entropy_with_logits(self.out(h[-1]).float().squeeze(1), y)
            self.losses.append(loss.item())
            return loss + 1e-3 * updates.sum(1).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    torch.manual_seed(0)
    x = torch.randn(256, 6, 1)
    model = Model()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=8, precision="bf16-mixed", enable_model_summary=False, **options)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0, 0] > 0).float()), 32)
    trainer.fit(model, batches)
    assert sum(model.losses[-8:]) < 0.5 * sum(model.losses[:8])


# the rest of torch.nn.LSTM's behaviour, for every class


@every_network
@every_depth
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_torchs(network, layers, bidirectional, batch_first):
    """Of outputs and states: a batch, an empty one, one sequence, packed sequences."""
    options = {"bidirectional": bidirectional, "batch_first": batch_first}
    rnn = network(I, H, layers, **options)
    theirs = (nn.LSTM if is_lstm(network) else nn.GRU)(I, H, layers, **options)
    shape = (B, T, I) if batch_first else (T, B, I)
    inputs = [torch.randn(shape), torch.randn(T, I)]
    inputs.append(pack_padded_sequence(inputs[0], [4, T, 1, 4], batch_first, enforce_sorted=False))
    inputs.append(torch.randn(0, T, I) if batch_first else torch.randn(T, 0, I))
    for x in inputs:
        output, state, updates = rnn(x)
        expected, their_state = theirs(x)
        if isinstance(x, PackedSequence):
            assert output.batch_sizes.equal(expected.batch_sizes)
            assert updates.unsorted_indices.equal(expected.unsorted_indices)
            output, updates, expected = output.data, updates.data, expected.data
        assert output.shape == expected.shape
        assert updates.shape[: expected.dim() - 1] == expected.shape[:-1]
        assert isinstance(state, tuple) == isinstance(their_state, tuple)
        pairs = zip(state, their_state, strict=True) if is_lstm(network) else [(state, their_state)]
        assert [mine.shape for mine, _ in pairs] == [part.shape for part in entries(their_state)]


def test_attributes_are_torchs():
    for options in ({}, {"bias": False, "batch_first": True, "dropout": 0.2, "bidirectional": True}):
        ours, theirs = SkipLSTM(I, H, 2, **options), nn.LSTM(I, H, 2, **options)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert all(name in repr(ours) for name in options)


@every_network
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_a_learned_initial_state_it_is_zero(network, bidirectional):
    rnn = make(network, 2, learn_initial_state=False, bidirectional=bidirectional)
    x = sequences()
    zeros = torch.zeros(2 * (1 + bidirectional), B, H, dtype=x.dtype)
    torch.manual_seed(3)
    expected = rnn(x)[0]
    torch.manual_seed(3)
    assert torch.equal(rnn(x, (zeros, zeros) if is_lstm(network) else zeros)[0], expected)


@every_network
def test_what_is_given_stays_as_it_is_and_gets_its_gradient(network):
    rnn = make(network, 2)
    x = sequences().requires_grad_()
    state = [torch.randn(2, B, H, dtype=x.dtype, requires_grad=True) for _ in range(1 + is_lstm(network))]
    kept = [part.detach().clone() for part in (x, *state)]
    output, after, _ = rnn(x, state, lengths=[T, 3, 1, 5])
    (output.sum() + entries(after)[0].sum()).backward()
    for given, before in zip((x, *state), kept, strict=True):
        assert torch.equal(given, before)
        assert given.grad.abs().max() > 0


@every_network
def test_training_and_evaluation_compute_the_same(network):
    """As torch.nn.LSTM without dropout; random policies draw in both."""
    rnn, x = make(network, 2), sequences()
    results = []
    for mode in (True, False):
        torch.manual_seed(1)
        results.append(rnn.train(mode)(x)[0])
    assert torch.equal(*results)


@every_network
def test_strided_input_is_taken(network):
    rnn = make(network)
    x = torch.randn(T, B, 2 * I, dtype=torch.float64)[..., ::2]
    results = []
    for one in (x, x.contiguous()):
        torch.manual_seed(1)
        results.append(rnn(one.transpose(0, 1))[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("rnn", [nn.LSTM, LSTM, SkipLSTM, SALSTM, SkipGRU])
def test_a_tagger_learns_with_its_lstm_replaced(rnn):
    """The model of torch's sequence tutorial: a tag for every word, sentence by sentence."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn, self.out = nn.Embedding(9, 6), rnn(6, 12), nn.Linear(12, 3)

        def forward(self, sentence):
            output, *_ = self.rnn(self.embedding(sentence).view(len(sentence), 1, -1))
            return self.out(output.view(len(sentence), -1))

    torch.manual_seed(0)
    sentences = [([0, 1, 2, 0, 3], [0, 1, 2, 0, 1]), ([4, 5, 6, 7], [1, 2, 0, 1]), ([0, 8, 2], [0, 1, 2])]
    pairs = [(torch.tensor(words), torch.tensor(tags)) for words, tags in sentences]
    tagger = Tagger()
    optimizer = torch.optim.Adam(tagger.parameters(), 2e-2)
    losses = []
    for _ in range(60):
        loss = sum(functional.cross_entropy(tagger(words), tags) for words, tags in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(tagger(words).argmax(1), tags) for words, tags in pairs)


def test_a_state_of_another_batch_direction_or_depth_is_named():
    for layers, bidirectional, shape in ((1, False, (1, B + 1, H)), (1, True, (1, B, H)), (2, True, (2, B, H))):
        with pytest.raises(ValueError, match="state h must be"):
            SkipGRU(I, H, layers, bidirectional=bidirectional)(torch.zeros(T, B, I), torch.zeros(shape))


def test_types_tell_what_comes_back(tmp_path):
    """A type checker knows (h, c) from h, packed from padded, and the options' names."""
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "use.py"
    file.write_text(TYPED)
    printed, _, _ = api.run([str(file), "--config-file", str(ROOT / "pyproject.toml")])
    found = [re.sub(r".*: (note|error): ", "", line).replace("torch._tensor.", "") for line in printed.splitlines()]
    assert [line for line in found if "Revealed" in line] == ['Revealed type is "Tensor"'] * 4
    assert sum("error: " in line for line in printed.splitlines()) == 2
    assert any(line.startswith("No overload variant") for line in found)
    assert any("dropuot" in line for line in found)
    assert (ROOT / "skiprnn" / "py.typed").exists()


TYPED = """
import torch
from torch.nn.utils.rnn import pack_sequence
from skiprnn import SkipGRU, SkipLSTM

x = torch.zeros(3, 2, 1)
output, (h, c), updates = SkipLSTM(1, 4)(x)
packed, last, packed_updates = SkipGRU(1, 4)(pack_sequence([x[:, 0]]))
reveal_type(c)
reveal_type(packed.data)
reveal_type(last)
reveal_type(updates)
SkipLSTM(1, 4)(x, 5)
SkipLSTM(1, 4, dropuot=0.5)
"""


PAGE = (ROOT / "docs" / "module.md").read_text()


def test_every_line_of_the_page_has_its_test():
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("|")][2:]
    tests = {name for file in ROOT.glob("tests/test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(rows) > 25
    for row in rows:
        shown = re.findall(r"`(test_\w+)`", row[-2])
        assert shown, row[1]
        assert set(shown) <= tests, row[1]


def test_the_code_of_the_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/module.md", "exec"), {})

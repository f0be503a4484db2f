"""Arguments of torch.nn.LSTM that change what is computed: directions, dropout, biases; and precision."""

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
from torch.nn import functional

from skiprnn import LSTM, SAGRU, RandomSkipLSTM, SkipGRU, SkipLSTM

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


def test_dropout_that_is_none_is_named():
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

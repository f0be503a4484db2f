"""The public modules: nn.LSTM's habits, lengths, continuation, stacks, and gradients against an independent loop."""

import copy
import io
import pickle

import pytest
import torch
from conftest import entries
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from skiprnn import (
    GRU,
    LSTM,
    SAGRU,
    SALSTM,
    GatedState,
    RandomSkipGRU,
    RandomSkipLSTM,
    Recurrent,
    SkipGRU,
    SkipLSTM,
)

B, T, I, H = 4, 9, 3, 5  # noqa: E741


class RandomNeuronsLSTM(Recurrent):
    """SA-RNN's baseline has no public name of its own."""

    def __init__(self, input_size, hidden_size, num_layers=1, **options):
        super().__init__("lstm", "random_neurons", input_size, hidden_size, num_layers, p_skip=0.5, **options)


class RandomNeuronsGRU(Recurrent):
    def __init__(self, input_size, hidden_size, num_layers=1, **options):
        super().__init__("gru", "random_neurons", input_size, hidden_size, num_layers, p_skip=0.5, **options)


NETWORKS = [LSTM, GRU, RandomSkipLSTM, RandomSkipGRU, SkipLSTM, SkipGRU, SALSTM, SAGRU]
NETWORKS += [RandomNeuronsLSTM, RandomNeuronsGRU]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
every_depth = pytest.mark.parametrize("layers", [1, 2])


def lively(rnn: Recurrent) -> Recurrent:
    """Parameters at which updates and skips both happen often, whatever the policy."""
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.normal_(std=0.7)
        if hasattr(rnn.policy, "update_bias"):
            rnn.policy.bias.fill_(-0.9)
    return rnn


def make(network: type[Recurrent], layers: int = 1, seed: int = 0, **options) -> Recurrent:
    """A lively network in float64."""
    torch.manual_seed(seed)
    return lively(network(I, H, layers, dtype=torch.float64, batch_first=True, **options))


def sequences(batch: int = B, steps: int = T) -> torch.Tensor:
    return torch.randn(batch, steps, I, dtype=torch.float64)


def fix_draw(rnn: Recurrent, x: torch.Tensor):
    """Random policies repeat one draw for the whole batch from here on; returns how to look at a part of it."""
    draw = rnn.policy.draw(x, sum(cell.hidden_size for cell in rnn.cells))

    def look_at(rows=slice(None), steps=slice(None)) -> None:
        rnn.policy.draw = lambda x, neurons: None if draw is None else draw[rows, steps]

    look_at()
    return look_at


def assert_same(actual, expected) -> None:
    """Of two states, or lists of what entries gives."""
    for ours, theirs in zip(
        *(one if isinstance(one, list) else entries(one) for one in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def is_lstm(network: type[Recurrent]) -> bool:
    return "LSTM" in network.__name__


def is_per_neuron(network: type[Recurrent]) -> bool:
    return network.__name__.startswith(("SA", "RandomNeurons"))


# shapes and dtypes


@every_network
@every_depth
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(network, layers, dtype):
    rnn = network(I, H, layers, dtype=dtype, batch_first=True)
    output, state, updates = rnn(torch.randn(B, T, I, dtype=dtype))
    assert output.shape == (B, T, H)
    assert updates.shape == ((B, T, layers * H) if is_per_neuron(network) else (B, T))
    h = state[0] if is_lstm(network) else state
    assert isinstance(state, tuple) == is_lstm(network)
    gate = [(B, 1), (B, 1)] if network.__name__.startswith("Skip") else []
    assert [part.shape for part in entries(state)] == [(layers, B, H)] * (1 + is_lstm(network)) + gate
    assert isinstance(h, GatedState) == bool(gate)
    assert {part.dtype for part in (output, updates, *entries(state))} == {dtype}
    assert set(updates.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(output[:, -1], h[-1])


@every_network
@every_depth
def test_without_batch_first_input_and_output_are_time_major(network, layers):
    rnn = make(network, layers)
    x = sequences()
    fix_draw(rnn, x)
    expected_output, expected_state, expected_updates = rnn(x)
    rnn.batch_first = False
    output, state, updates = rnn(x.transpose(0, 1))
    assert torch.equal(output, expected_output.transpose(0, 1))
    assert torch.equal(updates, expected_updates.transpose(0, 1))
    assert_same(state, expected_state)
    assert network(I, H, layers)(torch.randn(T, B, I))[0].shape == (T, B, H)


@every_network
def test_each_layer_may_have_its_own_size(network):
    torch.manual_seed(0)
    rnn = network(I, [4, 6], 2, batch_first=True)
    x = torch.randn(B, T, I)
    output, state, updates = rnn(x)
    assert output.shape == (B, T, 6)
    assert updates.shape == ((B, T, 4 + 6) if is_per_neuron(network) else (B, T))
    h = state[0] if is_lstm(network) else state
    for entry in state if is_lstm(network) else [state]:
        assert [tuple(layer.shape) for layer in entry] == [(B, 4), (B, 6)]
    assert torch.equal(h[1], output[:, -1])
    if network.__name__.startswith("Skip"):  # the gate's state rides along on the top layer's h
        rnn.policy.bias.data.fill_(-1.0)
        whole, (start, middle, _) = rnn(x), rnn(x[:, :5])
        assert torch.equal(torch.cat([start, rnn(x[:, 5:], middle)[0]], 1), whole[0])
        assert isinstance((middle[0] if is_lstm(network) else middle)[-1], GatedState)
    assert rnn(x, state)[0].shape == output.shape


# lengths


@every_network
@every_depth
def test_lengths_equal_each_sequence_truncated_alone(network, layers):
    rnn = make(network, layers)
    x = sequences().requires_grad_()
    look_at = fix_draw(rnn, x)
    lengths = [T, 1, 4, 6]
    weights, last_weights = torch.randn(B, T, H, dtype=torch.float64), torch.randn(layers, B, H, dtype=torch.float64)

    def loss(output, state, updates, b, steps) -> torch.Tensor:
        """A sum over the valid steps, the last state and the updates of one sequence."""
        total = (output * weights[b, :steps]).sum() + (entries(state)[0][:, 0] * last_weights[:, b]).sum()
        return total + 0.3 * updates.sum() if updates.requires_grad else total

    total = torch.zeros((), dtype=torch.float64)
    alone = []
    for b, steps in enumerate(lengths):
        look_at(slice(b, b + 1), slice(steps))
        alone.append(rnn(x[b : b + 1, :steps]))
        total = total + loss(*alone[-1], b, steps)
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in rnn.named_parameters()}
    expected_x = x.grad.clone()
    rnn.zero_grad()
    x.grad = None

    look_at()
    output, state, updates = rnn(x, lengths=torch.tensor(lengths))
    total = torch.zeros((), dtype=torch.float64)
    for b, (steps, (their_output, their_state, their_updates)) in enumerate(zip(lengths, alone, strict=True)):
        torch.testing.assert_close(output[b, :steps], their_output[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(output[b, steps:], output[b, steps - 1].expand(T - steps, H))  # the last valid one repeats
        assert torch.equal(updates[b, :steps], their_updates[0])
        assert updates[b, steps:].sum() == 0
        mine = [part[b : b + 1] if part.dim() == 2 else part[:, b : b + 1] for part in entries(state)]
        assert_same(mine, their_state)
        total = total + loss(output[b, :steps], mine[:1], updates[b], b, steps)
    total.backward()
    for name, parameter in rnn.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert parameter.grad.abs().max() > 0, name
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-10, atol=1e-12)
    for b, steps in enumerate(lengths):
        assert x.grad[b, steps:].abs().sum() == 0
        assert x.grad[b, :steps].abs().sum() > 0 or updates[b].sum() == 0


@every_network
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_what_stands_in_padded_steps_does_not_matter(network, engine):
    """Even if it is nan."""
    rnn = make(network, 2, engine=engine)
    x = sequences()
    fix_draw(rnn, x)
    lengths = torch.tensor([T, 3, 5, 1])
    other = x.clone()
    for b, steps in enumerate(lengths):
        other[b, steps:] = torch.nan
    output, state, updates = rnn(x, lengths=lengths)
    other_output, other_state, other_updates = rnn(other, lengths=lengths)
    assert torch.equal(output, other_output)
    assert torch.equal(updates, other_updates)
    assert_same(state, other_state)


@every_network
def test_lengths_of_all_steps_change_nothing(network):
    rnn = make(network, 2)
    x = sequences()
    fix_draw(rnn, x)
    output, state, updates = rnn(x)
    same_output, same_state, same_updates = rnn(x, lengths=torch.full((B,), T))
    torch.testing.assert_close(same_output, output, rtol=1e-12, atol=1e-12)
    assert torch.equal(same_updates, updates)
    assert_same(same_state, state)


# nn.LSTM's forms of input


@every_network
@every_depth
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_is_a_batch_of_one_without_the_batch(network, layers, batch_first):
    rnn = make(network, layers)
    rnn.batch_first = batch_first
    x = sequences(batch=1)
    look_at = fix_draw(rnn, x)
    output, state, updates = rnn(x if batch_first else x.transpose(0, 1))
    batch = 0 if batch_first else 1
    alone_output, alone_state, alone_updates = rnn(x[0])
    assert alone_output.shape == (T, H)
    assert entries(alone_state)[0].shape == (layers, H)
    assert torch.equal(alone_output, output.squeeze(batch))
    assert torch.equal(alone_updates, updates.squeeze(batch))
    assert_same(alone_state, [part.squeeze(-2 if part.dim() == 3 else 0) for part in entries(state)])
    look_at(steps=slice(4))
    first, middle, _ = rnn(x[0, :4])
    look_at(steps=slice(4, None))
    second, end, _ = rnn(x[0, 4:], middle)
    torch.testing.assert_close(torch.cat([first, second]), alone_output, rtol=1e-12, atol=1e-12)
    assert_same(end, alone_state)
    h, c = torch.randn(2, layers, H, dtype=torch.float64)
    assert rnn(x[0, 4:], (h, c) if is_lstm(network) else h)[0].shape == (T - 4, H)
    with pytest.raises(ValueError, match="takes no lengths"):
        rnn(x[0], lengths=[3])


@every_network
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("lengths", "enforce_sorted"), [([T, 6, 6, 2], True), ([4, T, 1, 4], False)])
def test_packed_sequences_equal_lengths(network, batch_first, lengths, enforce_sorted):
    """In, out and state as torch.nn.LSTM has them: the state in the order before sorting."""
    rnn = make(network, 2)
    x = sequences()
    fix_draw(rnn, x)
    output, state, updates = rnn(x, lengths=lengths)
    rnn.batch_first = batch_first
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    packed_output, packed_state, packed_updates = rnn(packed)
    theirs, (their_h, _) = nn.LSTM(I, H, 2).double()(packed)
    assert entries(packed_state)[0].shape == their_h.shape
    assert_same(packed_state, state)
    for ours in (packed_output, packed_updates):
        assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            mine, expected = getattr(ours, name), getattr(theirs, name)
            assert mine is expected is None or torch.equal(mine, expected)
    valid = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    for ours, expected in ((packed_output, output), (packed_updates, updates)):
        padded, found = pad_packed_sequence(ours, batch_first=True)
        assert found.tolist() == lengths
        assert torch.equal(padded[valid], expected[valid])
    with pytest.raises(ValueError, match="leave out lengths"):
        rnn(packed, lengths=lengths)


@every_network
def test_lengths_may_be_a_list(network):
    rnn = make(network)
    x = sequences()
    fix_draw(rnn, x)
    assert torch.equal(rnn(x, lengths=[T, 1, 4, 6])[0], rnn(x, lengths=torch.tensor([T, 1, 4, 6]))[0])
    with pytest.raises(ValueError, match="lengths must be integers, one per sequence; got 'abcd'"):
        rnn(x, lengths="abcd")


@every_network
def test_the_layout_is_torchs(network):
    assert network(I, H).batch_first is nn.LSTM(I, H).batch_first is False
    output, state, updates = network(I, H)(torch.randn(T, B, I))
    assert output.shape == (T, B, H)
    assert updates.shape[:2] == (T, B)
    assert entries(state)[0].shape == (1, B, H)
    assert network(I, H).flatten_parameters() is None


# torch's weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@every_depth
def test_weights_from_torch_and_back(layers, bias, bidirectional, batch_first):
    torch.manual_seed(0)
    dropout = 0.5 if layers > 1 else 0.0
    theirs = nn.LSTM(
        I, H, layers, bias=bias, batch_first=batch_first, dropout=dropout, bidirectional=bidirectional
    ).eval()
    ours = LSTM.from_torch(theirs).eval()
    assert ours.dropout == ours.to_torch().dropout == dropout
    assert ours.to_torch().bias == bias
    x = torch.randn(B, T, I)
    expected, (h, c) = theirs(x)
    for output, (last_h, last_c) in (ours(x)[:2], ours.to_torch().eval()(x)):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(last_h, h, rtol=0, atol=1e-6)
        torch.testing.assert_close(last_c, c, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("network", [SkipLSTM, SALSTM])
def test_fine_tuning_starts_at_the_lstm_and_learns_to_skip(network, bidirectional):
    """However large its states are, at which gates drawn anew would skip anything."""
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, 2, bidirectional=bidirectional)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4)
    ours = network.from_torch(theirs, learn_initial_state=True)
    ours.policy.set_epoch(30)
    x = 5 * torch.randn(30, B, I)
    output, _, updates = ours(x)
    assert updates.min() == 1
    torch.testing.assert_close(output, theirs(x)[0], rtol=0, atol=1e-5)
    assert all(cell.learn_initial_state for cell in ours.cells)
    optimizer = torch.optim.Adam(ours.policy.parameters(), 0.1)
    for _ in range(25):
        optimizer.zero_grad()
        ours(x)[2].mean().backward()
        optimizer.step()
    assert ours(x)[2].mean() < 0.7


def test_what_does_not_go_between_torch_and_ours_is_named():
    with pytest.raises(ValueError, match="resets the state before the product"):
        SkipGRU.from_torch(nn.GRU(I, H))
    with pytest.raises(ValueError, match=r"takes a torch.nn.LSTM; got GRU"):
        SkipLSTM.from_torch(nn.GRU(I, H))
    with pytest.raises(ValueError, match="SkipLSTM has no proj_size"):
        SkipLSTM.from_torch(nn.LSTM(I, H, 2, proj_size=2))
    for options in ({"bias": False}, {"bidirectional": True}):
        with pytest.raises(ValueError, match="LSTM's: leave them out"):
            SkipLSTM.from_torch(nn.LSTM(I, H), **options)
    with pytest.raises(ValueError, match="begins with zeros"):
        LSTM(I, H).to_torch()
    with pytest.raises(ValueError, match="one hidden size"):
        LSTM(I, [4, 5], 2, learn_initial_state=False).to_torch()


# continuing


@every_network
@every_depth
def test_continuing_at_any_step_equals_one_run(network, layers):
    rnn = make(network, layers)
    x = sequences()
    look_at = fix_draw(rnn, x)
    output, state, updates = rnn(x)
    for split in range(1, T):
        look_at(steps=slice(split))
        first, middle, first_updates = rnn(x[:, :split])
        look_at(steps=slice(split, None))
        second, end, second_updates = rnn(x[:, split:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), output, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.cat([first_updates, second_updates], 1), updates)
        assert_same(end, state)


@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_a_skip_goes_on_in_the_continuation_if_the_gate_is_carried(network):
    rnn = make(network)
    x = sequences()
    updates = rnn(x)[2]
    split = int((updates == 0).any(0).nonzero()[0])  # a step that some sequence skips
    carried = rnn(x[:, :split])[1]
    *plain, q, s = entries(carried)
    plain[0] = plain[0] * 1
    assert type(plain[0]) is torch.Tensor
    copied = tree_map(lambda part: part.detach().clone().to("cpu"), carried)  # truncated backpropagation
    for state in (carried, copied, [*plain, q, s]):
        assert torch.equal(rnn(x[:, split:], state)[2][:, 0], updates[:, split])
    assert not any(part.requires_grad for part in entries(copied))
    for state in (plain, [plain[0].numpy(force=True)]):  # torch's state knows no gate: it starts anew
        state = [torch.as_tensor(part) for part in [*state, *plain[len(state) :]]]
        assert rnn(x[:, split:], state)[2][:, 0].tolist() == [1.0] * B
    others = Recurrent(network.cell_and_policy[0], "always", I, H, dtype=torch.float64)
    assert others(x.transpose(0, 1), carried)[1] is not None  # a network without a gate takes the rest


@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_a_state_is_stored_copied_and_compiled_with_its_gate(network):
    rnn = make(network)
    x = sequences(steps=4)
    state = tree_map(torch.Tensor.detach, rnn(x)[1])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    expected = rnn(x, state)
    for one in (torch.load(file, weights_only=True), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_same(one, state)
        assert torch.equal(rnn(x, one)[0], expected[0])
    rnn.engine = "reference"  # which all transforms see through
    torch._dynamo.reset()
    assert_same(torch.compile(rnn, fullgraph=True, backend="eager")(x, state)[1], expected[1])
    inside = torch.vmap(lambda one: rnn(one, rnn(one)[1])[0])(x.unsqueeze(1))
    torch.testing.assert_close(inside.squeeze(1), rnn(x, rnn(x)[1])[0])


@every_network
@every_depth
def test_torch_style_states_are_taken(network, layers):
    rnn = make(network, layers)
    x = sequences()
    fix_draw(rnn, x)
    h, c = torch.randn(2, layers, B, H, dtype=torch.float64)
    results = [rnn(x, given) for given in ([(h, c), [h, c]] if is_lstm(network) else [h, [h]])]
    for output, state, _ in results[1:]:
        assert torch.equal(output, results[0][0])
        assert_same(state, results[0][1])
    assert not torch.equal(results[0][0], rnn(x)[0])


@every_network
def test_the_initial_state_is_the_learned_one(network):
    rnn = make(network, 2)
    x = sequences()
    fix_draw(rnn, x)
    initial = [
        torch.stack([part.detach() for part in parts])
        for parts in zip(*(c.initial_state(B) for c in rnn.cells), strict=True)
    ]
    output, state, _ = rnn(x, tuple(initial))
    expected_output, expected_state, _ = rnn(x)
    assert torch.equal(output, expected_output)
    assert_same(state, expected_state)


# copies


@every_network
@every_depth
def test_pickle_deepcopy_and_state_dict_keep_the_function(network, layers):
    rnn = make(network, layers)
    rnn.policy.set_epoch(30)
    x = sequences()

    def run(model: Recurrent) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        output, _, updates = model(x)
        return output, updates

    expected = run(rnn)
    file = io.BytesIO()
    torch.save(rnn.state_dict(), file)
    file.seek(0)
    restored = network(I, H, layers, dtype=torch.float64, batch_first=True)
    assert not torch.equal(run(restored)[0], expected[0])
    restored.load_state_dict(torch.load(file, weights_only=True))
    for model in (pickle.loads(pickle.dumps(rnn)), copy.deepcopy(rnn), restored):
        assert type(model) is network
        for ours, theirs in zip(run(model), expected, strict=True):
            assert torch.equal(ours, theirs)
    copied = copy.deepcopy(rnn)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert torch.equal(run(rnn)[0], expected[0])  # nothing shared


def test_another_architecture_is_refused():
    with pytest.raises(RuntimeError, match="policy"):
        SkipLSTM(I, H).load_state_dict(LSTM(I, H).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        SkipGRU(I, H).load_state_dict(SkipGRU(I, H + 1).state_dict())


@every_network
def test_reset_parameters_draws_as_the_constructor_does(network):
    torch.manual_seed(2)
    rnn = network(I, H, 2, batch_first=True)
    fresh = {name: value.clone() for name, value in rnn.state_dict().items()}
    lively(rnn)
    rnn.policy.set_epoch(60)
    rnn.reset_parameters()
    for name, value in rnn.state_dict().items():
        constant = name.endswith((".bias", ".slope")) and not name.startswith(
            "policy.layers"
        )  # coordinators draw theirs
        assert torch.equal(value, fresh[name]) == constant, name


# errors; every class checks its input in the same place
some_networks = pytest.mark.parametrize(
    "network", [LSTM, RandomSkipGRU, SkipLSTM, SAGRU], ids=lambda network: network.__name__
)


@some_networks
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(I,), (B, T, I + 1), (B, 0, I), (B, T, I, 1)])
def test_wrong_input_shapes_are_named(network, shape, batch_first):
    rnn = network(I, H, batch_first=batch_first)
    if not batch_first and len(shape) == 3:
        shape = (shape[1], shape[0], shape[2])
    layout = "(batch, steps, input)" if batch_first else "(steps, batch, input)"
    with pytest.raises(ValueError, match="x must be") as error:
        rnn(torch.zeros(shape))
    assert str(error.value) == f"x must be {layout} with at least one step and {I} inputs; got {shape}"


@some_networks
def test_what_is_no_tensor_is_named(network):
    with pytest.raises(ValueError, match="x must be a tensor or a PackedSequence; got list"):
        network(I, H)([[0.0] * I])
    x = torch.zeros(T, B, I)
    for state, found in (
        ("abc", "str"),
        (5, "int"),
        (x.numpy(), "ndarray"),
        (torch.tensor(1.0), "Tensor"),
        ([x.numpy()], "list"),
        (([1],), "tuple"),
        ((1, 2), "tuple"),
        ((), "tuple"),
    ):
        with pytest.raises(ValueError, match=f"state must hold h.*; got {found}"):
            network(I, H)(x, state)


@some_networks
def test_other_dtypes_are_named(network):
    with pytest.raises(ValueError, match=r"x is torch.float64, the parameters are torch.float32"):
        network(I, H, batch_first=True)(torch.zeros(B, T, I, dtype=torch.float64))


@some_networks
@pytest.mark.parametrize(
    "lengths", [torch.ones(B - 1, dtype=torch.long), torch.ones(B, 1, dtype=torch.long), torch.ones(B), torch.tensor(3)]
)
def test_wrong_lengths_are_named(network, lengths):
    with pytest.raises(ValueError, match=f"lengths must be {B} integers"):
        network(I, H, batch_first=True)(torch.zeros(B, T, I), lengths=lengths)


@some_networks
@pytest.mark.parametrize("shape", [(1, B, H), (2, B + 1, H), (2, B, H + 1), (B, H), (3, B, H)])
def test_wrong_state_shapes_are_named(network, shape):
    rnn = network(I, H, 2, batch_first=True)
    h = torch.zeros(shape)
    state = (h, h) if is_lstm(network) else h
    with pytest.raises(ValueError, match="state h must be") as error:
        rnn(torch.zeros(B, T, I), state)
    assert f"[({B}, {H}), ({B}, {H})] over the layers" in str(error.value)


@some_networks
def test_states_of_another_dtype_are_named(network):
    h = torch.zeros(1, B, H, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state h is torch.float64, the parameters are torch.float32"):
        network(I, H, batch_first=True)(torch.zeros(B, T, I), (h, h) if is_lstm(network) else h)


@pytest.mark.parametrize("network", [LSTM, RandomSkipLSTM, SkipLSTM, SALSTM])
def test_an_lstm_needs_its_cell_state(network):
    h = torch.zeros(1, B, H)
    for state in (h, (h,)):
        with pytest.raises(ValueError, match="state must hold h, c"):
            network(I, H, batch_first=True)(torch.zeros(B, T, I), state)


def test_gates_that_do_not_fit_are_refused():
    x, h, gate = torch.zeros(H, T, I), torch.zeros(1, H, H), torch.zeros(H, 1)
    with pytest.raises(ValueError, match="state must hold h; got 3 parts"):
        GRU(I, H, batch_first=True)(x, (h, gate, gate))
    with pytest.raises(ValueError, match="state must hold h and the gate; got 2 parts"):
        SkipGRU(I, H, batch_first=True)(x, (h, gate))
    for wrong in (torch.zeros(H), torch.zeros(H + 1, 1), torch.zeros(H, H)):  # (H,) would broadcast to (H, H)
        with pytest.raises(ValueError, match=r"gate must be 2 of \(5, 1\); got"):
            SkipGRU(I, H, batch_first=True)(x, (h, wrong, wrong))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lstn", "always", I, H), "unknown cell 'lstn'; there are lstm, gru"),
        (("lstm", "never", I, H), "unknown policy 'never'; there are always"),
        (("lstm", "always", 0, H), "sizes must be at least 1.*input_size=0"),
        (("lstm", "always", I, 0), "sizes must be at least 1.*hidden_size=0"),
        (("lstm", "always", I, H, 0), "sizes must be at least 1.*num_layers=0"),
        (("lstm", "always", I, [4, 5]), "a hidden size for each layer.*num_layers=1"),
        (("lstm", "always", I, [4, 5], 3), "a hidden size for each layer.*num_layers=3"),
        (("lstm", "always", I, [], 0), "sizes must be at least 1"),
        (("lstm", "always", 3.0, H), "sizes must be integers; got input_size=3.0"),
        (("lstm", "always", I, 5.0), "sizes must be integers.*hidden_size=5.0"),
        (("lstm", "always", I, [4, 5.0], 2), "sizes must be integers"),
        (("lstm", "always", I, "5"), "sizes must be integers.*hidden_size='5'"),
        (("lstm", "always", I, None), "sizes must be integers.*hidden_size=None"),
        (("lstm", "always", I, torch.tensor(5)), "sizes must be integers.*hidden_size=tensor"),
    ],
)
def test_wrong_construction_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recurrent(*arguments)


def test_unknown_engine_is_named():
    with pytest.raises(ValueError, match="unknown engine 'warp'; there are auto, reference"):
        LSTM(I, H, engine="warp")


@pytest.mark.parametrize("network", [RandomSkipLSTM, RandomSkipGRU])
def test_random_skip_networks_check_p_skip(network):
    assert network(I, H).policy.p_skip == 0.5
    for p_skip in (-0.5, 1.5):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            network(I, H, p_skip=p_skip)


# stacks


def single(network: type[Recurrent], stack: Recurrent, layer: int) -> Recurrent:
    """One layer of a stack as a network of its own, without the policy's parameters."""
    cell = stack.cells[layer]
    rnn = network(cell.input_size, cell.hidden_size, dtype=torch.float64, batch_first=True)
    rnn.cells[0].load_state_dict(cell.state_dict())
    return rnn


def test_lstm_is_torch_lstm():
    """Two layers, every step: torch.nn.LSTM with gates permuted, forget bias 1, and our initial states."""
    rnn = make(LSTM, 2)
    theirs = nn.LSTM(I, H, 2, batch_first=True).double()
    order = torch.cat([torch.arange(H) + gate * H for gate in (0, 2, 1, 3)])  # i, j, f, o -> i, f, g, o
    with torch.no_grad():
        for layer, cell in enumerate(rnn.cells):
            getattr(theirs, f"weight_ih_l{layer}").copy_(cell.weight_ih[order])
            getattr(theirs, f"weight_hh_l{layer}").copy_(cell.weight_hh[order])
            getattr(theirs, f"bias_ih_l{layer}").copy_(cell.bias[order])
            getattr(theirs, f"bias_hh_l{layer}").zero_()[H : 2 * H] = 1.0
    x = sequences()
    h, c = (torch.stack(parts) for parts in zip(*(cell.initial_state(B) for cell in rnn.cells), strict=True))
    expected, (expected_h, expected_c) = theirs(x, (h, c))
    output, (h, c), updates = rnn(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, expected_h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c, expected_c, rtol=1e-12, atol=1e-12)
    assert updates.min() == 1


@pytest.mark.parametrize("network", [LSTM, GRU])
def test_a_stack_is_a_chain_of_layers(network):
    stack = make(network, 2)
    x = sequences()
    below, below_state, _ = single(network, stack, 0)(x)
    output, top_state, _ = single(network, stack, 1)(below)
    ours, state, _ = stack(x)
    torch.testing.assert_close(ours, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        entries(state)[0], torch.cat([entries(below_state)[0], entries(top_state)[0]]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("network", [RandomSkipLSTM, RandomSkipGRU, SkipLSTM, SkipGRU])
@every_depth
def test_skipping_is_as_if_the_skipped_inputs_were_not_there(network, layers):
    """Step policies copy all layers together, so the kept inputs alone, without skipping, give the same states."""
    rnn = make(network, layers)
    plain = Recurrent(
        "lstm" if is_lstm(network) else "gru", "always", I, H, layers, dtype=torch.float64, batch_first=True
    )
    plain.layers.load_state_dict(rnn.layers.state_dict())
    x = sequences(steps=20)
    output, state, updates = rnn(x)
    assert 0.1 < updates.mean() < 0.9
    for b in range(B):
        kept = updates[b] == 1
        expected, expected_state, _ = plain(x[b : b + 1, kept])
        torch.testing.assert_close(output[b, kept], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entries(state)[0][:, b], entries(expected_state)[0][:, 0], rtol=1e-12, atol=1e-12)
        last = torch.cummax(torch.where(kept, torch.arange(20), -1), 0).values
        for t in range(20):
            if last[t] >= 0:  # a skipped step shows what the last update left
                assert torch.equal(output[b, t], output[b, last[t]])


@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_all_layers_of_a_skip_stack_copy_together(network):
    rnn = make(network, 2)
    x = sequences(steps=20)
    state, copied, updated = None, 0, 0
    for t in range(20):
        previous = state
        _, state, u = rnn(x[:, t : t + 1], previous)
        if previous is None:
            continue
        for entry in range(1 + is_lstm(network)):
            same = (entries(state)[entry] == entries(previous)[entry]).all(-1)  # (layer, sequence)
            assert torch.equal(same, (u[:, 0] == 0).expand(2, B))
        copied, updated = copied + (u == 0).sum(), updated + (u == 1).sum()
    assert copied > 5
    assert updated > 5


@pytest.mark.parametrize("network", [SALSTM, SAGRU])
def test_layers_of_a_selective_stack_read_the_updated_state_below(network):
    stack = make(network, 2)
    stack.policy.set_epoch(25)
    parts = [single(network, stack, layer) for layer in range(2)]
    for layer, part in enumerate(parts):
        part.policy.coordinators[0].load_state_dict(stack.policy.coordinators[layer].state_dict())
        part.policy.set_epoch(25)
    x = sequences()
    below, below_state, below_updates = parts[0](x)
    output, top_state, top_updates = parts[1](below)
    ours, state, updates = stack(x)
    assert 0.1 < updates.mean() < 0.9
    torch.testing.assert_close(ours, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        entries(state)[0], torch.cat([entries(below_state)[0], entries(top_state)[0]]), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(updates, torch.cat([below_updates, top_updates], -1))


@pytest.mark.parametrize("network", [SALSTM, SAGRU, RandomNeuronsLSTM, RandomNeuronsGRU])
def test_neurons_that_do_not_update_keep_their_state(network):
    rnn = make(network, 2)
    x = sequences(steps=12)
    state = None
    for t in range(12):
        previous = state
        _, state, u = rnn(x[:, t : t + 1], previous)
        if previous is not None:
            kept = u.view(B, 2, H).transpose(0, 1) == 0
            for entry in range(1 + is_lstm(network)):
                assert torch.equal(entries(state)[entry] == entries(previous)[entry], kept)


# gradients


@pytest.mark.parametrize("network", [LSTM, GRU])
def test_gradients_agree_with_finite_differences(network):
    torch.manual_seed(3)
    rnn = lively(network(2, 3, 2, dtype=torch.float64, batch_first=True))
    names, parameters = zip(*rnn.named_parameters(), strict=True)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 2])

    def run(x, *values):
        output, state, _ = torch.func.functional_call(
            rnn, dict(zip(names, values, strict=True)), (x,), {"lengths": lengths}
        )
        return output, entries(state)[0]

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def binary(x: torch.Tensor) -> torch.Tensor:
    """Straight-through rounding without a custom Function: x plus a constant."""
    return x + ((x > 0.5).to(x.dtype) - x).detach()


def lstm_step(cell, x, state):
    """The LSTM of the authors' code for a single sequence."""
    h, c = state
    i, j, f, o = (cell.weight_ih @ x + cell.weight_hh @ h + cell.bias).view(4, -1)
    c = c * torch.sigmoid(f + 1) + torch.sigmoid(i) * torch.tanh(j)
    return torch.tanh(c) * torch.sigmoid(o), c


def gru_step(cell, x, state):
    """The GRU of the authors' code for a single sequence."""
    (h,) = state
    w, v, b = (part.view(3, cell.hidden_size, -1) for part in (cell.weight_ih, cell.weight_hh, cell.bias))
    r, z = (torch.sigmoid(w[k] @ x + v[k] @ h + b[k, :, 0]) for k in (0, 1))
    candidate = torch.tanh(w[2] @ x + v[2] @ (r * h) + b[2, :, 0])
    return (z * h + (1 - z) * candidate,)


def skip_alone(rnn: Recurrent, x: torch.Tensor, masks=()):
    """Skip RNN of one sequence x (T, I), from the papers' equations: outputs (T, H), updates (T,).

    masks: dropout's, (T, H) for each layer but the top.
    """
    step = lstm_step if len(rnn.cells[0].state_names) == 2 else gru_step
    states = [tuple(part[0] for part in cell.initial_state(1)) for cell in rnn.cells]
    gate = torch.ones((), dtype=x.dtype)  # ũ, always updates first
    delta = torch.ones((), dtype=x.dtype)
    outputs, updates = [], []
    for t, x_t in enumerate(x):
        u = binary(gate)
        below, mixed = x_t, []
        for layer, (cell, previous) in enumerate(zip(rnn.cells, states, strict=True)):
            candidate = step(cell, below, previous)
            below = candidate[0] * masks[layer][t] if layer < len(masks) else candidate[0]
            mixed.append(tuple(u * new + (1 - u) * old for new, old in zip(candidate, previous, strict=True)))
        top = candidate[-1]
        delta = u * torch.sigmoid((rnn.policy.weight * top).sum() + rnn.policy.bias[0]) + (1 - u) * delta
        accumulated = (1 - u) * gate
        gate = accumulated + torch.min(delta, 1 - accumulated)
        states = mixed
        outputs.append(states[-1][0])
        updates.append(u)
    return torch.stack(outputs), torch.stack(updates)


def selective_alone(rnn: Recurrent, x: torch.Tensor):
    """SA-RNN of one sequence: outputs (T, H), updates (T, N)."""
    step = lstm_step if len(rnn.cells[0].state_names) == 2 else gru_step
    states = [tuple(part[0] for part in cell.initial_state(1)) for cell in rnn.cells]
    outputs, updates = [], []
    for x_t in x:
        below, decisions = x_t, []
        for layer, (cell, coordinator) in enumerate(zip(rnn.cells, rnn.policy.coordinators, strict=True)):
            h = states[layer][0]
            a = torch.diag(coordinator.weight_state) @ h + coordinator.weight_input @ below + coordinator.bias
            u = binary(torch.clip((rnn.policy.slope * a + 1) / 2, 0, 1))
            candidate = step(cell, below, states[layer])
            states[layer] = tuple(u * new + (1 - u) * old for new, old in zip(candidate, states[layer], strict=True))
            below = states[layer][0]
            decisions.append(u)
        outputs.append(below)
        updates.append(torch.cat(decisions))
    return torch.stack(outputs), torch.stack(updates)


@every_depth
@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU, SALSTM, SAGRU])
def test_learned_policies_agree_with_an_independent_loop(network, layers):
    """Outputs, decisions and every gradient of task loss + λ * updates, one sequence at a time."""
    rnn = make(network, layers, seed=5)
    rnn.policy.set_epoch(10)
    x = sequences(steps=15).requires_grad_()
    output, _, updates = rnn(x)
    weights = torch.randn_like(output)
    inputs = [x, *rnn.parameters()]
    gradients = torch.autograd.grad((output * weights).sum() + 0.1 * updates.square().sum(), inputs)
    alone = selective_alone if is_per_neuron(network) else skip_alone
    outputs, decisions = (torch.stack(parts) for parts in zip(*(alone(rnn, one) for one in x), strict=True))
    assert 0.1 < decisions.mean() < 0.9
    torch.testing.assert_close(output, outputs, rtol=1e-10, atol=1e-12)
    assert torch.equal(updates, decisions.detach().round())
    expected = torch.autograd.grad((outputs * weights).sum() + 0.1 * decisions.square().sum(), inputs)
    for name, ours, theirs in zip(["x", *dict(rnn.named_parameters())], gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert theirs.abs().max() > 0, name

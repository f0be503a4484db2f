"""Streams against the network's own forward: one, several on their own clocks, saved and continued."""

import pytest
import torch

from skiprnn import GRU, SALSTM, RandomSkipGRU, Recurrent, SkipGRU, SkipLSTM
from skiprnn.model import engines, stream
from skiprnn.model.policies import POLICIES


def network(cell, policy, layers=1, **options):
    """One that skips some steps."""
    torch.manual_seed(1)
    if POLICIES[policy].draws:
        options["p_skip"] = 0.6
    rnn = Recurrent(cell, policy, 3, 5, layers, batch_first=True, dtype=torch.float64, **options)
    if policy == "skip":
        torch.nn.init.constant_(rnn.policy.bias, -1.0)
    return rnn


def states_of(rnn, state, batch=1):
    """Of each layer, and the gate's."""
    ((states, gate),) = rnn.unpack(state, batch)
    return [*(entry for entries in states for entry in entries), *gate]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_stream_is_the_network_sample_by_sample(cell, policy, layers, engine):
    """Also saved and continued after each few samples, and begun where rnn(x) ended."""
    rnn = network(cell, policy, layers, engine=engine)
    x = torch.randn(1, 40, 3, dtype=torch.float64)
    torch.manual_seed(2)
    output, state, updates = rnn(x)
    assert updates.any()
    assert (policy == "always") == bool(updates.all())
    torch.manual_seed(2)
    _, middle, _ = rnn(x[:, :7])
    live = rnn.stream(middle)
    for t in range(7, 40):
        if t % 5 == 0:
            live = rnn.stream(live.to_bytes())
        if POLICIES[policy].family == "step":
            assert (live.unneeded == 0) == bool(updates[0, t])
        pushed = live.push(x[0, t])
        torch.testing.assert_close(pushed.output, output[0, t].detach())
        assert pushed.unneeded == live.unneeded
        assert torch.equal(pushed.output, live.output)
    for ours, theirs in zip(states_of(rnn, live.state), states_of(rnn, state), strict=True):
        torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_streams_keep_their_own_time_at_the_cost_of_the_updates(cell, policy, layers, monkeypatch):
    """Samples come for some of four streams at a time; unneeded ones are passed, or pushed for nothing."""
    rnn = network(cell, policy, layers, engine="reference")
    x = torch.randn(4, 30, 3, dtype=torch.float64)
    drawn, rows, steps = [], [], torch.zeros(4, dtype=torch.int64)
    draws, run = rnn.policy.draw, engines.ENGINES["reference"].run
    monkeypatch.setattr(rnn.policy, "draw", lambda *given: drawn.append(draws(*given)) or drawn[-1])
    monkeypatch.setattr(engines.ENGINES["reference"], "run", lambda call: rows.append(len(call.x)) or run(call))
    live = rnn.stream(batch_size=4)
    neurons = 5 * layers
    decisions = torch.zeros(4, 30, *([neurons] if POLICIES[policy].family == "neuron" else []), dtype=torch.float64)
    outputs = torch.zeros(4, 30, 5, dtype=torch.float64)
    clock = torch.Generator().manual_seed(3)
    while (steps < 30).any():
        some = torch.randperm(4, generator=clock)[: int(torch.randint(1, 5, (), generator=clock))]
        some = some[steps[some] < 30]
        if not len(some):
            continue
        needed = live.unneeded[some] == 0
        output, unneeded = live.push(x[some, steps[some]], some)
        outputs[some, steps[some]] = output
        if policy == "random_neurons":
            decisions[some, steps[some]] = drawn[-1][:, 0]
        elif policy == "random_steps":
            decisions[some, steps[some]] = needed.double()
        assert torch.equal(live.unneeded[some], unneeded)
        assert torch.equal(live.output[some], output)
        steps[some] += 1
        passing = torch.minimum(live.unneeded, 30 - steps) // 2
        for stream_number, count in enumerate(passing.tolist()):
            outputs[stream_number, steps[stream_number] : steps[stream_number] + count] = live.output[stream_number]
        live.skip(passing)
        steps += passing
    counted = sum(rows)
    monkeypatch.setattr(rnn.policy, "draw", lambda *given: decisions if POLICIES[policy].draws else None)
    output, state, updates = rnn(x)
    torch.testing.assert_close(outputs, output.detach())
    for ours, theirs in zip(states_of(rnn, live.state, 4), states_of(rnn, state, 4), strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert counted == (updates.sum() if POLICIES[policy].family == "step" else 4 * 30)


@pytest.mark.parametrize("kind", [SkipGRU, RandomSkipGRU])
def test_beyond_the_horizon_it_looks_again(kind, monkeypatch):
    monkeypatch.setattr(stream, "HORIZON", 4)
    rnn = SkipGRU(1, 2) if kind is SkipGRU else RandomSkipGRU(1, 2, p_skip=1.0)
    if kind is SkipGRU:  # 19 steps of 1/40 are below a half
        torch.nn.init.zeros_(rnn.policy.weight)
        torch.nn.init.constant_(rnn.policy.bias, float(torch.logit(torch.tensor(1 / 39))))
    live = rnn.stream()
    if kind is SkipGRU:
        live.push(torch.ones(1))
    output, passed = live.output, 0
    while live.unneeded and passed < 60:
        assert live.unneeded <= 4
        passed += 1
        live.skip(1)
        assert torch.equal(live.output, output)
    assert passed == (19 if kind is SkipGRU else 60)


def test_what_was_saved_is_checked():
    rnn = SkipLSTM(3, 5)
    data = rnn.stream().to_bytes()
    assert rnn.stream(data).push(torch.zeros(3)).output.shape == (5,)
    for damaged in (data[:-1], data[:-3] + b"\1" + data[-2:], data.replace(b"stream 1", b"stream 2"), b"", b"x"):
        with pytest.raises(ValueError, match="damaged, or not what this version"):
            rnn.stream(damaged)
    with pytest.raises(ValueError, match=r"another network: h of layer 0 is torch.float32 \(1, 5\), here .*\(1, 6\)"):
        SkipLSTM(3, 6).stream(data)
    with pytest.raises(ValueError, match=r"another network: c of layer 0 is .*, here nothing"):
        SkipGRU(3, 5).stream(data)
    with pytest.raises(ValueError, match=r"float32 .* here torch.float64"):
        SkipLSTM(3, 5, dtype=torch.float64).stream(data)
    with pytest.raises(ValueError, match=r"h of layer 1 is nothing"):
        SkipLSTM(3, 5, 2).stream(data)
    with pytest.raises(ValueError, match="skips of selective is nothing"):
        SALSTM(3, 5).stream(data)
    several = rnn.stream(batch_size=2).to_bytes()
    with pytest.raises(ValueError, match=r"batch_size=2; got 3"):
        rnn.stream(several, batch_size=3)
    assert rnn.stream(several).push(torch.zeros(2, 3)).output.shape == (2, 5)


def test_bad_samples_and_streams_are_named_and_change_nothing():
    rnn = SkipLSTM(3, 5)
    live = rnn.stream(batch_size=4)
    before = live.to_bytes()
    for given, message in (
        (([0.0, 0.0, 0.0],), "must be a tensor; got list"),
        ((torch.zeros(3),), r"samples must be \(4, 3\); got \(3,\)"),
        ((torch.zeros(2, 3), [0, 0]), "each once"),
        ((torch.zeros(2, 3), [0, 4]), "streams 0 to 3"),
        ((torch.zeros(1, 3), [-1]), "streams 0 to 3"),
        ((torch.zeros(4, 3, dtype=torch.float64),), "x is torch.float64, the parameters are torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            live.push(*given)
    with pytest.raises(ValueError, match="can skip"):
        live.skip([0, 0, 0, 1])
    with pytest.raises(ValueError, match="can skip"):
        live.skip(-1)
    assert live.to_bytes() == before
    with pytest.raises(ValueError, match=r"samples must be \(3,\); got \(2,\)"):
        rnn.stream().push(torch.zeros(2))
    for wrong in (0, 2.0, "2"):
        with pytest.raises(ValueError, match="batch_size must be the number of streams"):
            rnn.stream(batch_size=wrong)
    with pytest.raises(ValueError, match="streams of a batch"):
        rnn.stream().push(torch.zeros(3), [0])


def test_what_is_returned_stays_as_it_was():
    live = GRU(3, 5).stream(batch_size=2)
    live.push(torch.zeros(2, 3))
    before = live.output
    kept = before.clone()
    live.push(torch.ones(2, 3))
    assert torch.equal(before, kept)
    assert not torch.equal(live.output, kept)

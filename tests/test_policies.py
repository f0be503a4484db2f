"""When states update: the papers' equations against hand-computed examples, closed forms and binomial bounds."""

import math

import numpy as np
import pytest
import torch
from conftest import entries

from skiprnn import Recurrent, SkipGRU, SkipLSTM
from skiprnn.model.cells import CELLS
from skiprnn.model.policies import (
    RandomNeurons,
    RandomSteps,
    Selective,
    Skip,
    make_policy,
    mix,
    straight_through_round,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# rounding


def test_rounding_is_half_to_even_and_passes_the_gradient_straight_through():
    x = torch.tensor([0.0, 0.2, 0.5, 0.5000001, 0.9, 1.0], requires_grad=True)
    u = straight_through_round(x)
    assert u.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    weights = torch.tensor([3.0, -1.0, 2.0, 0.5, 7.0, 11.0])
    (u * weights).sum().backward()
    assert torch.equal(x.grad, weights)  # du/dx = 1


# Skip


def n_skip(delta: float) -> int:
    """[SKIP] equation 6: min{n : n Δũ >= 0.5} - 1."""
    return next(n for n in range(1, 10_000) if n * delta >= 0.5) - 1


def update_steps(updates: torch.Tensor) -> list[int]:
    return updates.nonzero().flatten().tolist()


@pytest.mark.parametrize("delta", [0.97, 0.6, 0.45, 0.3, 0.2, 0.13, 0.07, 0.011])
@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
def test_a_constant_increment_skips_as_many_steps_as_equation_6(network, delta):
    torch.manual_seed(0)
    rnn = network(2, 3, batch_first=True).double()
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.fill_(logit(delta))
    steps = update_steps(rnn(torch.randn(1, 200, 2, dtype=torch.float64))[2][0])
    assert steps[0] == 0
    assert len(steps) > 2
    assert set(np.diff(steps) - 1) == {n_skip(delta)}


@pytest.mark.parametrize(("network", "entry"), [(SkipLSTM, 1), (SkipGRU, 0)])
def test_every_gap_follows_from_the_state_at_its_update(network, entry):
    """Δũ = sigmoid(w_p s_t + b_p), from the cell state of an LSTM and h of a GRU, says when the next update is."""
    torch.manual_seed(1)
    rnn = network(2, 6, batch_first=True).double()
    with torch.no_grad():
        rnn.policy.weight.mul_(2)
        rnn.policy.bias.fill_(-1.5)
    x = torch.randn(1, 150, 2, dtype=torch.float64)
    w, b = rnn.policy.weight.detach().numpy(), rnn.policy.bias.item()
    state, updates, increments = None, [], []
    for t in range(x.shape[1]):
        _, state, u = rnn(x[:, t : t + 1], state)
        updates.append(u.item())
        increments.append(1 / (1 + np.exp(-(entries(state)[entry][0, 0].detach().numpy() @ w + b))))
    steps = update_steps(torch.tensor(updates))
    gaps = [n_skip(increments[t]) for t in steps]
    assert len(set(gaps)) > 3  # the state matters
    assert steps == [0, *np.cumsum([gap + 1 for gap in gaps[:-1]])]


@pytest.mark.parametrize("network", [SkipLSTM, SkipGRU])
@pytest.mark.parametrize("bias", [-20.0, 0.0, 20.0])
def test_the_first_step_always_updates(network, bias):
    torch.manual_seed(2)
    rnn = network(2, 3, batch_first=True)
    with torch.no_grad():
        rnn.policy.bias.fill_(bias)
    updates = rnn(torch.randn(8, 5, 2))[2]
    assert updates[:, 0].tolist() == [1.0] * 8


def test_exactly_one_half_is_no_update():
    """Δũ = 0.5: equation 6 would skip nothing; half-to-even rounding skips every other step."""
    rnn = SkipGRU(2, 3, batch_first=True)
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.zero_()
    assert rnn(torch.randn(1, 6, 2))[2].tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]
    assert n_skip(0.5) == 0


def test_the_increment_never_lifts_the_gate_above_one():
    policy = Skip(3)
    q, s = torch.tensor([[0.9], [0.9], [0.3]]), torch.tensor([[0.4], [0.0], [0.4]])
    torch.testing.assert_close(policy.decide((q, s), None), torch.tensor([[1.0], [0.9], [0.7]]))


def test_four_steps_by_hand():
    """Candidates say Δũ = 0.2, 0.3, 0.4, 0.6; the gate accumulates 0.2 + 0.2 + 0.2 until it rounds to an update.

    Gradients by hand, in units of dΔũ_1, where u carries the gradient of the accumulated gate a (straight-through),
    q' = u Δũ + (1 - u) q and s' = (1 - u) a:
        a_2 = Δũ_1                           du_2 = 1
        q_3: (0.3 - 0.2) 1 + 1 = 1.1         s_3: -0.2 + 1 = 0.8              a_3: 1.9 = du_3
        q_4: (0.4 - 0.2) 1.9 + 1.1 = 1.48    s_4: -0.4 * 1.9 + 1.9 = 1.14     a_4: 2.62 = du_4
    """
    policy = Skip(1).double()
    with torch.no_grad():
        policy.weight.fill_(2.0)
        policy.bias.fill_(0.5)
    tops = [
        torch.tensor([[(logit(delta) - 0.5) / 2]], dtype=torch.float64, requires_grad=True)
        for delta in (0.2, 0.3, 0.4, 0.6)
    ]
    gate = policy.initial_gate(1)
    accumulated, updates, gates = [], [], []
    for top in tops:
        accumulated.append(policy.decide(gate, None))
        updates.append(straight_through_round(accumulated[-1]))
        gate = mix(updates[-1], policy.after_update(gate, top), policy.after_skip(gate, accumulated[-1]))
        gates.append([part.item() for part in gate])
    assert [a.item() for a in accumulated] == pytest.approx([1.0, 0.2, 0.4, 0.6])
    assert [u.item() for u in updates] == [1.0, 0.0, 0.0, 1.0]
    assert np.array(gates) == pytest.approx(np.array([[0.2, 0.0], [0.2, 0.2], [0.2, 0.4], [0.6, 0.0]]))

    slope = 0.2 * (1 - 0.2)  # dΔũ_1 / da of the sigmoid
    for t, expected in ((1, 1.0), (2, 1.9), (3, 2.62)):
        by_top, by_weight, by_bias = torch.autograd.grad(
            updates[t].sum(), (tops[0], policy.weight, policy.bias), retain_graph=True
        )
        assert by_bias.item() == pytest.approx(expected * slope)
        assert by_weight.item() == pytest.approx(expected * slope * tops[0].item())
        assert by_top.item() == pytest.approx(expected * slope * 2.0)
    # skipped candidates have no say in what is decided: u = 0 multiplies their Δũ
    later = torch.autograd.grad(updates[3].sum(), tops[1:3], retain_graph=True)
    assert [gradient.item() for gradient in later] == [0.0, 0.0]
    # after the update the increment is the last candidate's, and s forgets
    assert torch.autograd.grad(gate[0].sum(), tops[3], retain_graph=True)[0].item() == pytest.approx(0.24 * 2.0)


def test_skip_initialisation():
    torch.manual_seed(3)
    policies = [Skip(20) for _ in range(100)]
    weights = torch.stack([policy.weight for policy in policies]).detach()
    limit = math.sqrt(6 / 21)
    assert 0.99 * limit < weights.abs().max() <= limit
    assert weights.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert {policy.bias.item() for policy in policies} == {1.0}
    assert Skip(3, update_bias=-1.0).bias.item() == -1.0


# random policies


def assert_rate(draw: torch.Tensor, p_skip: float) -> None:
    """The share of updates within five standard deviations of a binomial."""
    n = draw.numel()
    assert abs(draw.double().mean().item() - (1 - p_skip)) < 5 * math.sqrt(p_skip * (1 - p_skip) / n)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p_skip", [0.02, 0.2, 0.5, 0.9])
def test_random_steps_skip_at_their_rate_in_training_and_in_test(p_skip, training):
    torch.manual_seed(4)
    rnn = Recurrent("gru", "random_steps", 1, 1, p_skip=p_skip, batch_first=True).train(training)
    updates = rnn(torch.zeros(500, 40, 1))[2]
    assert updates.shape == (500, 40)
    assert set(updates.unique().tolist()) == {0.0, 1.0}
    assert_rate(updates, p_skip)
    # per sequence and step: neighbours in either direction agree as often as independent draws do
    agreement = p_skip**2 + (1 - p_skip) ** 2
    assert_rate(updates[1:] == updates[:-1], 1 - agreement)
    assert_rate(updates[:, 1:] == updates[:, :-1], 1 - agreement)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p_skip", [0.25, 0.5, 0.9])
def test_random_neurons_skip_at_their_rate_in_training_and_in_test(p_skip, training):
    torch.manual_seed(5)
    rnn = Recurrent("gru", "random_neurons", 1, 4, 2, p_skip=p_skip, batch_first=True).train(training)
    updates = rnn(torch.zeros(100, 30, 1))[2]
    assert updates.shape == (100, 30, 8)
    assert set(updates.unique().tolist()) == {0.0, 1.0}
    assert_rate(updates, p_skip)
    agreement = p_skip**2 + (1 - p_skip) ** 2
    assert_rate(updates[..., 1:] == updates[..., :-1], 1 - agreement)
    assert_rate(updates[..., 4:] == updates[..., :4], 1 - agreement)  # the layers draw their own


@pytest.mark.parametrize("policy", ["random_steps", "random_neurons"])
@pytest.mark.parametrize("cell", CELLS)
def test_p_skip_0_is_always_and_p_skip_1_is_never(cell, policy):
    torch.manual_seed(6)
    x = torch.randn(3, 7, 2)
    rnn = Recurrent(cell, policy, 2, 4, p_skip=0.0, batch_first=True)
    plain = Recurrent(cell, "always", 2, 4, batch_first=True)
    plain.load_state_dict(rnn.state_dict())
    output, _, updates = rnn(x)
    assert updates.min() == 1
    torch.testing.assert_close(output, plain(x)[0])
    never = Recurrent(cell, policy, 2, 4, p_skip=1.0, batch_first=True)
    output, state, updates = never(x)
    assert updates.max() == 0
    initial = never.cells[0].initial_state(3)
    assert all(torch.equal(output[:, t], initial[0]) for t in range(7))
    assert torch.equal(entries(state)[0][0], initial[0])


@pytest.mark.parametrize("policy", [RandomSteps, RandomNeurons])
def test_random_policies_follow_torchs_generator(policy):
    x = torch.zeros(8, 30, 1)
    torch.manual_seed(7)
    first, second = policy(0.5).draw(x, 3), policy(0.5).draw(x, 3)
    torch.manual_seed(7)
    assert torch.equal(policy(0.5).draw(x, 3), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p_skip", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("policy", ["random_steps", "random_neurons"])
def test_p_skip_out_of_range_is_refused(policy, p_skip):
    with pytest.raises(ValueError, match=r"p_skip .* in \[0, 1\]; got "):
        make_policy(policy, [], p_skip)


def test_p_skip_is_required_where_it_belongs_and_refused_elsewhere():
    cells = [CELLS["gru"](2, 3)]
    for policy in ("random_steps", "random_neurons"):
        with pytest.raises(ValueError, match=f"{policy} needs p_skip"):
            make_policy(policy, cells)
    for policy in ("always", "skip", "selective"):
        with pytest.raises(ValueError, match=f"{policy} has no p_skip"):
            make_policy(policy, cells, 0.0)
    with pytest.raises(ValueError, match="unknown policy 'sometimes'; there are always, random_steps"):
        make_policy("sometimes", cells)


# Selective


def selective(slope_epoch: int = 0) -> Selective:
    """One input, three neurons; a = 0.5 h + x - 0.25 for each."""
    policy = Selective([(1, 3)]).double()
    coordinator = policy.coordinators[0]
    with torch.no_grad():
        coordinator.weight_input.fill_(1.0)
        coordinator.weight_state.fill_(0.5)
        coordinator.bias.fill_(-0.25)
    policy.set_epoch(slope_epoch)
    return policy


@pytest.mark.parametrize("epoch", [0, 25, 100])
def test_neurons_update_where_the_hard_sigmoid_exceeds_one_half(epoch):
    """clamp((α a + 1) / 2, 0, 1) > 0.5 where a > 0, whatever the slope; a = 0 is no update."""
    policy = selective(epoch)
    x = torch.tensor([[0.25], [0.25], [-3.0], [3.0]], dtype=torch.float64)
    h = torch.tensor([[0.0, 1e-9, -1e-9], [2.0, -2.0, 0.0], [1.0, 5.6, 9.0], [0.0, -5.6, -9.0]], dtype=torch.float64)
    a = 0.5 * h + x - 0.25
    assert (a == 0).any()
    assert torch.equal(policy.decide(0, x, h, None), (a > 0).double())


@pytest.mark.parametrize(("epoch", "slope"), [(0, 1.0), (25, 2.0), (100, 5.0), (400, 5.0)])
def test_the_gradient_is_half_the_slope_inside_the_hard_sigmoid_and_zero_outside(epoch, slope):
    policy = selective(epoch)
    targets = torch.tensor([-1.01, -0.99, 0.99, 1.01], dtype=torch.float64) / slope  # a, around the corners
    x = (targets + 0.25).unsqueeze(1).requires_grad_()
    h = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    policy.decide(0, x, h, None).sum().backward()
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(x.grad[:, 0], 3 * inside * slope / 2)  # three neurons read it, weight 1
    torch.testing.assert_close(h.grad, (0.5 * inside * slope / 2).unsqueeze(1).expand(4, 3))  # its own alone
    coordinator = policy.coordinators[0]
    torch.testing.assert_close(coordinator.bias.grad, torch.full((3,), 2 * slope / 2, dtype=torch.float64))


def test_the_coordinator_sees_its_own_neuron_alone():
    torch.manual_seed(8)
    coordinator = Selective([(2, 4)]).coordinators[0]
    jacobian = torch.autograd.functional.jacobian(lambda h: coordinator(torch.randn(2), h), torch.randn(4))
    assert torch.equal(jacobian, torch.diag(coordinator.weight_state.detach()))


def test_the_slope_is_annealed_by_epoch():
    policy = Selective([(2, 3)])
    assert policy.slope.item() == 1.0
    for epoch, slope in ((1, 1.04), (37, 2.48), (99, 4.96), (100, 5.0), (101, 5.0), (600, 5.0), (0, 1.0)):
        policy.set_epoch(epoch)
        assert policy.slope.item() == pytest.approx(slope)
    policy.set_epoch(50)
    policy.reset_parameters()
    assert policy.slope.item() == 1.0


def test_the_slope_is_kept_with_the_weights():
    policy, restored = Selective([(2, 3)]), Selective([(2, 3)])
    policy.set_epoch(37)
    restored.load_state_dict(policy.state_dict())
    assert restored.slope.item() == pytest.approx(2.48)
    assert not restored.slope.requires_grad


def test_coordinator_initialisation_is_torch_linears():
    """torch.nn.Linear(I + H, H): everything from U(-1/√(I+H), 1/√(I+H))."""
    torch.manual_seed(9)
    inputs, hidden = 14, 50
    limit = 1 / math.sqrt(inputs + hidden)
    coordinators = [Selective([(inputs, hidden)]).coordinators[0] for _ in range(20)]
    for name in ("weight_input", "weight_state", "bias"):
        values = torch.cat([getattr(coordinator, name).flatten() for coordinator in coordinators]).detach()
        assert 0.98 * limit < values.abs().max() <= limit
        assert values.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.06)

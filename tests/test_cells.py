"""One step of each cell against torch.nn's cells, numpy closed forms, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from skiprnn.model.cells import CELLS, Cell, GRUCell, LSTMCell

B, I, H = 4, 3, 5  # noqa: E741


def randomised(cell: Cell) -> Cell:
    """All parameters drawn from N(0, 1), so that none is 0 or 1 by its initialisation; float64."""
    cell = cell.double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_()
    return cell


def random_state(cell: Cell) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, cell.hidden_size, dtype=torch.float64) for _ in cell.state_names)


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def numpy_matrix(cell: Cell, gate: int) -> np.ndarray:
    """One gate's weights over [x, h], (H, I + H)."""
    rows = slice(gate * cell.hidden_size, (gate + 1) * cell.hidden_size)
    return np.concatenate([cell.weight_ih[rows].detach().numpy(), cell.weight_hh[rows].detach().numpy()], 1)


def numpy_step(cell: Cell, x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """The papers' formulas, written out over concatenated [x, h]."""
    inputs, h = x.numpy(), state[0].numpy()
    biases = cell.bias.detach().numpy().reshape(len(cell.gates), -1)

    def gate(k: int, previous: np.ndarray) -> np.ndarray:
        return np.concatenate([inputs, previous], 1) @ numpy_matrix(cell, k).T + biases[k]

    if isinstance(cell, LSTMCell):
        i, j, f, o = (gate(k, h) for k in range(4))
        c = state[1].numpy() * sigmoid(f + 1) + sigmoid(i) * np.tanh(j)
        return [np.tanh(c) * sigmoid(o), c]
    r, u = sigmoid(gate(0, h)), sigmoid(gate(1, h))
    candidate = np.tanh(gate(2, r * h))
    return [u * h + (1 - u) * candidate]


def torch_order(parameter: torch.Tensor) -> torch.Tensor:
    """Rows i, j, f, o -> torch's i, f, g, o (torch's g is the candidate j)."""
    i, j, f, o = parameter.chunk(4)
    return torch.cat([i, f, j, o])


def test_lstm_is_torch_lstm_with_permuted_gates_and_forget_bias_one():
    torch.manual_seed(0)
    cell = randomised(LSTMCell(I, H))
    theirs = nn.LSTMCell(I, H).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(torch_order(cell.weight_ih))
        theirs.weight_hh.copy_(torch_order(cell.weight_hh))
        theirs.bias_ih.copy_(torch_order(cell.bias))
        theirs.bias_hh.zero_()
        theirs.bias_hh[H : 2 * H] = 1.0  # the forget gate, second in torch's order
    x, state = torch.randn(B, I, dtype=torch.float64), random_state(cell)
    for ours, expected in zip(cell(x, state), theirs(x, state), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_step_is_the_numpy_formula(name):
    torch.manual_seed(1)
    cell = randomised(CELLS[name](I, H))
    x, state = torch.randn(B, I, dtype=torch.float64), random_state(cell)
    for ours, expected in zip(cell(x, state), numpy_step(cell, x, state), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def torch_gru(cell: GRUCell) -> nn.GRUCell:
    """torch's GRU cell with the same weights; its gates are r, z, n as ours."""
    theirs = nn.GRUCell(cell.input_size, cell.hidden_size).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(cell.weight_ih)
        theirs.weight_hh.copy_(cell.weight_hh)
        theirs.bias_ih.copy_(cell.bias)
        theirs.bias_hh.zero_()
    return theirs


def test_gru_differs_from_torch_gru_by_the_place_of_the_reset_gate_alone():
    torch.manual_seed(2)
    cell = randomised(GRUCell(I, H))
    x, state = torch.randn(B, I, dtype=torch.float64), random_state(cell)
    assert (cell(x, state)[0] - torch_gru(cell)(x, state[0])).abs().max() > 0.01
    with torch.no_grad():
        cell.bias[:H] = 100.0  # r = 1: before or after the product is the same
    torch.testing.assert_close(cell(x, state)[0], torch_gru(cell)(x, state[0]), rtol=1e-12, atol=1e-12)


def assert_uniform(weight: torch.Tensor, limit: float) -> None:
    """Within ±limit and filling it; a uniform's standard deviation is limit / √3."""
    assert weight.abs().max() <= limit
    assert weight.max() > 0.99 * limit
    assert weight.min() < -0.99 * limit
    assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_lstm_weights_are_glorot_uniform_as_one_matrix():
    torch.manual_seed(4)
    inputs, hidden = 20, 50
    cell = LSTMCell(inputs, hidden)
    limit = math.sqrt(6 / ((inputs + hidden) + 4 * hidden))
    assert_uniform(cell.weight_ih, limit)
    assert_uniform(cell.weight_hh, limit)


def test_gru_weights_are_glorot_uniform_gates_and_candidate_apart():
    torch.manual_seed(5)
    inputs, hidden = 20, 50
    cell = GRUCell(inputs, hidden)
    gates, candidate = slice(0, 2 * hidden), slice(2 * hidden, None)
    for weight in (cell.weight_ih, cell.weight_hh):
        assert_uniform(weight[gates], math.sqrt(6 / ((inputs + hidden) + 2 * hidden)))
        assert_uniform(weight[candidate], math.sqrt(6 / ((inputs + hidden) + hidden)))


def test_initial_biases():
    assert LSTMCell(I, H).bias.tolist() == [0.0] * 4 * H
    assert GRUCell(I, H).bias.tolist() == [1.0] * 2 * H + [0.0] * H


@pytest.mark.parametrize("name", CELLS)
def test_initial_states_are_standard_normal_and_shared_by_the_batch(name):
    torch.manual_seed(6)
    cells = [CELLS[name](1, 40) for _ in range(50)]
    for entry in range(len(cells[0].state_names)):
        drawn = torch.cat([cell.initial_state(1)[entry].flatten() for cell in cells]).detach()
        n = len(drawn)
        assert abs(drawn.mean().item()) < 5 / math.sqrt(n)
        assert abs(drawn.var().item() - 1) < 5 * math.sqrt(2 / n)
        assert abs((drawn.abs() < 1).double().mean().item() - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n)
    state = cells[0].initial_state(B)
    assert all(torch.equal(entry[0], entry[b]) for entry in state for b in range(B))
    sum(entry.sum() for entry in state).backward()
    assert cells[0].initial_h.grad.tolist() == [float(B)] * 40  # one vector, trained by every sequence


@pytest.mark.parametrize("name", CELLS)
def test_initial_states_can_be_fixed_zeros(name):
    cell = CELLS[name](I, H, learn_initial_state=False)
    assert all(torch.equal(entry, torch.zeros(B, H)) for entry in cell.initial_state(B))
    assert set(dict(cell.named_parameters())) == {"weight_ih", "weight_hh", "bias"}
    assert set(cell.state_dict()) == {"weight_ih", "weight_hh", "bias"}


@pytest.mark.parametrize("name", CELLS)
def test_reset_parameters_draws_everything_anew(name):
    torch.manual_seed(7)
    cell = CELLS[name](I, H)
    before = {key: value.detach().clone() for key, value in cell.named_parameters()}
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(9.0)
    cell.reset_parameters()
    for key, value in cell.named_parameters():
        assert not (value == 9).any(), key
        assert torch.equal(value, before[key]) == (key == "bias"), key


@pytest.mark.parametrize("name", CELLS)
def test_gradients_agree_with_finite_differences(name):
    torch.manual_seed(8)
    cell = randomised(CELLS[name](2, 3))
    names, parameters = zip(*cell.named_parameters(), strict=True)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def step(x, *values):
        named = dict(zip(names, values, strict=True))
        state = tuple(named[f"initial_{entry}"].expand(2, -1) for entry in cell.state_names)
        return torch.func.functional_call(cell, named, (x, state))

    assert torch.autograd.gradcheck(step, (x, *parameters))


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_an_update_costs_the_products_with_the_weights(name, gates):
    assert CELLS[name](I, H).flops_per_update() == gates * H * (I + H)


def test_a_cell_that_overrides_forward_is_refused():
    """Engines call step on an input that is projected already: forward would be ignored."""
    with pytest.raises(TypeError, match="Late: a cell's forward is step"):
        type("Late", (LSTMCell,), {"forward": lambda self, x, state: state})

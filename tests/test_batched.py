"""The batched engine against the reference engine, in float64 on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engines import assert_equal, network, random_state, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from skiprnn.model import engines
from skiprnn.model.engines import operator, runs
from skiprnn.model.engines.operator import Arriving
from skiprnn.model.engines.problems import by_layers, problem_of
from skiprnn.model.policies import POLICIES


@settings(max_examples=150, deadline=None)
@given(
    cell=st.sampled_from(["lstm", "gru"]),
    policy=st.sampled_from(list(POLICIES)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3)),
    bias=st.sampled_from([-2.5, -1.5, -0.5, 0.0, 2.0]),
    ragged=st.booleans(),
    given_state=st.booleans(),
    epoch=st.sampled_from([0, 60]),
    seed=st.integers(0, 1000),
)
def test_batched_equals_reference(cell, policy, sizes, bias, ragged, given_state, epoch, seed):
    batch, steps, inputs, hidden, layers = sizes
    torch.manual_seed(seed)
    x = torch.randn(batch, steps, inputs, dtype=torch.float64)
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    state = random_state(cell, policy, batch, hidden) if given_state and layers == 1 else None
    runs = []
    for engine in ("reference", "batched"):
        rnn = network(cell, policy, inputs, hidden, layers, engine, seed, bias, epoch, dtype=torch.float64)
        runs.append(results(rnn, x, seed, state, lengths))
    assert_equal(runs[1], runs[0], 1e-10)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("policy", "layers"), [("always", 1), ("random_steps", 2), ("skip", 2), ("selective", 1)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_packed_runs_equal_the_reference_one_by_one(cell, policy, layers, ragged):
    torch.manual_seed(3)
    x = torch.randn(3, 4, 12, 2, dtype=torch.float64)
    lengths = torch.tensor([12, 3, 0, 7]) if ragged else None
    outcomes = {}
    for engine in ("batched", "reference"):
        networks = [network(cell, policy, 2, 5, layers, engine, seed, -0.5, dtype=torch.float64) for seed in range(3)]
        torch.manual_seed(4)
        calls = [rnn.prepare(batch, lengths=lengths) for rnn, batch in zip(networks, x, strict=True)]
        found = engines.run_packed(engine, calls)
        losses = [
            (run + 1) * (one.output.square().sum() + one.states[0][-1].sum() + one.updates.sum())
            for run, one in enumerate(found)
        ]
        torch.stack(losses).sum().backward()
        gradients = [p.grad for rnn in networks for p in rnn.parameters() if p.grad is not None and p.grad.any()]
        outcomes[engine] = [one.output.detach() for one in found] + [one.updates.detach() for one in found] + gradients
    assert policy == "always" or 0 < torch.stack(outcomes["reference"][3:6]).mean() < 1
    for ours, theirs in zip(*outcomes.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_nan_shows_where_the_reference_shows_it(cell, policy):
    """And a skipped sample may be nan."""
    x = torch.randn(4, 15, 2)
    x[1, 4] = torch.nan
    outcomes = []
    for engine in ("reference", "batched"):
        rnn = network(cell, policy, 2, 6, 1, engine, bias=-1.0)
        torch.manual_seed(1)
        with torch.no_grad():
            outcomes.append(rnn(x))
    for ours, theirs in zip(outcomes[1][::2], outcomes[0][::2], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_inference_equals_training():
    for policy in POLICIES:
        rnn = network("gru", policy, 2, 9, 1, "batched", bias=-1.0)
        x = torch.randn(5, 30, 2)
        torch.manual_seed(1)
        trained = rnn(x)
        torch.manual_seed(1)
        with torch.no_grad():
            inferred = rnn(x)
        assert trained[0].requires_grad
        assert torch.equal(trained[0], inferred[0])
        assert torch.equal(trained[2], inferred[2])


@pytest.mark.parametrize("policy", ["skip", "selective"])
def test_opcheck(policy):
    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    gate = [torch.rand(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)] if policy == "skip" else []
    policy_weights = {
        "skip": [tensor(2, 4), tensor(2)],
        "selective": [tensor(2, 4, 2), tensor(2, 4), tensor(2, 4), torch.ones(2, dtype=torch.float64)],
    }[policy]
    arguments = (
        "batched",
        "gru",
        policy,
        tensor(2, 3, 6, 2),
        [tensor(2, 3, 4)],
        [tensor(2, 12, 2), tensor(2, 12, 4), tensor(2, 12)],
        gate,
        policy_weights,
        None,
        torch.tensor([[6, 2, 4], [1, 6, 0]]),
        True,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.recurrence, arguments, test_utils=tests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_graph_could_record_it(cell, policy):
    """On a GPU that is not there: no value is read back, no shape depends on one, nothing is copied from the host."""
    problems = []

    def note(calls, layer):
        problems.append(runs.stacked([problem_of("batched", call, layer) for call in calls]))
        return runs._run("batched", calls, layer)

    def on_gpu(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    noted: list = []
    kernels = operator.KERNELS["batched"]
    rnn, x = network(cell, policy, 1, 5, 2, "batched"), torch.ones(3, 7, 1)
    for lengths in (None, torch.ones(3, dtype=torch.int64)):
        by_layers([rnn.prepare(x, lengths=lengths)], note)
    with FakeTensorMode():
        for found in problems:
            parts = tree_map_only(torch.Tensor, lambda one: on_gpu(one), tuple(found))
            problem = type(found)(*parts)
            with _Noting(noted):
                outputs = kernels.forward(problem, True)
                gate = outputs.final_gate if problem.gate else None
                arriving = Arriving(outputs.output, outputs.final, gate, outputs.updates)
                gradients = kernels.backward(problem, outputs, arriving, True)
            assert all(part.is_cuda for part in gradients.flat)
    assert len(problems) == (2 if policy == "skip" else 4)
    assert not noted


class _Noting(TorchDispatchMode):
    """Notes operations that take more than a number from the CPU, or read a value back."""

    def __init__(self, noted: list):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if function is torch.ops.aten._local_scalar_dense.default or any(
            not one.is_cuda and one.dim() for one in tensors
        ):
            self.noted.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 7, 12, 784])
def test_the_product_over_all_steps_is_that_of_its_pieces(steps):
    rows, columns = torch.randn(2, steps, 3, 4, dtype=torch.float64), torch.randn(2, steps, 3, 5, dtype=torch.float64)
    expected = torch.einsum("rtbk,rtbx->rkx", rows, columns)
    torch.testing.assert_close(runs.summed_product(rows, columns), expected)

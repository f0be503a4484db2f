"""The CUDA engine's kernels, run on the CPU thread by thread, beside the reference engine."""

import functools
import os
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build
from torch.nn import functional

from skiprnn.model import engines
from skiprnn.model.engines import contact, cuda, trial
from skiprnn.model.engines.cuda import nvrtc, operator
from skiprnn.model.recurrent import Recurrent
from skiprnn.training import setup

ROOT = Path(__file__).parents[1]

VARIANTS = [
    pytest.param(one, marks=() if one.policy in ("skip", "selective") else pytest.mark.slow)
    for one in contact.VARIANTS
    if cuda.unfit((rnn := trial.network(one, trial.RAGGED[2])).cells, rnn.policy) is None
]


@pytest.fixture
def emulated(tmp_path_factory, monkeypatch):
    """Launches go to the CPU."""
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def library(defines):
        return build(operator.SOURCE, dict(defines), folder)

    def load(source, defines, names):
        same = {"D_OUTPUT": 1} if names == ["forward"] else {}  # of no matter to it: one library less
        kernels = library(tuple(sorted({**defines, **same}.items())))
        return {name: functools.partial(kernels.launch, name, order=7) for name in names}

    monkeypatch.setattr(nvrtc, "load", load)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_results_and_gradients_are_the_references(emulated, variant):
    for lengths in (False, True):
        assert trial.error("cuda", "cpu", variant, lengths) < contact.TOLERANCE


def small(cell: str, policy: str, inputs: int, hidden: int, seed: int) -> Recurrent:
    torch.manual_seed(seed)
    p_skip = 0.4 if policy.startswith("random") else None
    rnn = Recurrent(cell, policy, inputs, hidden, 1, batch_first=True, p_skip=p_skip)
    with torch.no_grad():
        for parameter in rnn.policy.parameters():
            parameter.mul_(8)  # some decisions are out of reach of a gradient
    return rnn


def gradients(engine: str, networks, xs, loss) -> list[torch.Tensor]:
    """Of every network's parameters and input, all in one launch where the engine does that."""
    draws = []
    for seed, (network, x) in enumerate(zip(networks, xs, strict=True)):
        network.zero_grad()
        x.grad = None
        torch.manual_seed(seed)
        draws.append(network.policy.draw(x, network.cells[0].hidden_size))
    calls = [network.prepare(x, draw=draw) for network, x, draw in zip(networks, xs, draws, strict=True)]
    sum(loss(result) for result in engines.run_packed(engine, calls)).backward()
    found = []
    for network, x in zip(networks, xs, strict=True):
        found += [x.grad, *(parameter.grad for parameter in network.parameters())]
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def assert_near(wanted, found) -> None:
    for one, other in zip(wanted, found, strict=True):
        assert (one - other).norm() <= 2 * contact.TOLERANCE * one.norm() + 1e-6


def last_state(result):
    return result.states[0][0].square().sum() + 1e-2 * result.updates.sum()


def an_output_after_long_silence(result):
    """Where the gradient of the last state has all but vanished, a large one arrives."""
    return 1e-25 * result.states[0][0].sum() + 1e6 * result.output[:, 3].sum()


@pytest.mark.parametrize(
    ("policy", "loss"),
    [(policy, last_state) for policy in operator.POLICIES] + [("skip", an_output_after_long_silence)],
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_several_runs_in_one_launch(emulated, cell, policy, loss):
    """Three tiles, the last of three sequences; two warps; an odd number of units; inputs of two, with a gradient."""
    networks = [small(cell, policy, 2, 29, seed) for seed in range(2)]
    xs = [torch.randn(35, 9, 2, requires_grad=True) for _ in networks]
    wanted, found = (gradients(engine, networks, xs, loss) for engine in ("reference", "cuda"))
    assert_near(wanted, found)


def test_exact_ties_of_the_gate(emulated):
    """q = 1 - s = 1/2 in every second step: half of the gradient to each."""
    rnn, x = small("lstm", "skip", 1, 4, 0), torch.randn(2, 7, 1, requires_grad=True)
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.zero_()
    wanted, found = (gradients(engine, [rnn], [x], last_state) for engine in ("reference", "cuda"))
    assert_near(wanted, found)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gate_after_the_last_step(emulated, cell):
    rnn, x = small(cell, "skip", 2, 13, 0), torch.randn(3, 6, 2)
    with torch.no_grad():
        (wanted,), (found,) = (engines.run_packed(engine, [rnn.prepare(x)]) for engine in ("reference", "cuda"))
    for one, other in zip(wanted.gate, found.gate, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=contact.TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_any_integers(emulated, dtype):
    rnn, x = small("lstm", "always", 1, 4, 0), torch.randn(3, 6, 1)
    call = rnn.prepare(x, lengths=torch.tensor([2, 6, 4], dtype=dtype))
    with torch.no_grad():
        (wanted,), (found,) = (engines.run_packed(engine, [call]) for engine in ("reference", "cuda"))
    assert torch.equal(found.updates, wanted.updates)


@pytest.mark.parametrize("policy", ["skip", "selective"])
def test_what_is_nan_shows(emulated, policy):
    """In the state, whatever is decided; as in the reference."""
    rnn, x = small("lstm", policy, 2, 13, 0), torch.randn(2, 5, 2)
    x[0, 3] = torch.nan
    with torch.no_grad():
        (result,) = engines.run_packed("cuda", [rnn.prepare(x)])
    assert result.states[0][0].isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (("lstm", "always", 8, 119, 1), None),
        (("lstm", "always", 8, 120, 1), "a step reads 129 numbers"),
        (("lstm", "always", 1, 80, 2), "a step reads 161 numbers"),
        (("gru", "skip", 1, 40, 2), "no layers that share a gate"),
        (("gru", "selective", 5, 40, 1), "up to 4 inputs; there are 5"),
    ],
)
def test_what_does_not_fit_is_refused(network, reason):
    rnn = Recurrent(*network)
    found = cuda.unfit(rnn.cells, rnn.policy)
    assert found is None if reason is None else reason in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "cosine"),
    [("lstm", 0.9999), ("gru", 0.999), ("skip_gru_lambda0.0001", 0.999), ("skip_lstm_lambda0.0001", 0.99)],
)
def test_gradients_of_trained_networks_over_784_steps(emulated, row, cosine, tmp_path):
    """Where rounding has most to add up over; of Skip, a decision on the edge falls either way."""
    if "SKIPRNN_MIRROR" not in os.environ:
        pytest.skip("SKIPRNN_MIRROR names no folder with mnist")
    (file,) = (ROOT / "results" / "table1-paper" / "checkpoints" / "mnist" / row).glob("*/last.safetensors")
    module = setup.load(file, data_root=str(tmp_path), device="cpu", engine="native")
    inputs, targets, *_ = next(iter(module.data.training_batches(0)))
    found = []
    for engine in ("native", "cuda"):
        module.zero_grad()
        (result,) = engines.run_packed(engine, [module.network.rnn.prepare(inputs[:16])])
        loss = functional.cross_entropy(module.network.readout(result.states[-1][0]), targets[:16])
        (loss + 1e-4 * result.updates.sum(1).mean()).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert functional.cosine_similarity(*found, dim=0) > cosine

"""The GPU engine against the reference engine: on a GPU, or in Triton's interpreter on small shapes (see conftest.py).

In the interpreter it computes in float64 as well. And its kernels compiled for GPUs that are not there.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import entries, triton_kernels
from test_engines import assert_equal, network, random_state, results
from torch._subclasses.fake_tensor import FakeTensorMode

from skiprnn import LSTM, Recurrent, SkipLSTM
from skiprnn.model import engines
from skiprnn.model.engines import triton
from skiprnn.model.policies import POLICIES

pytest.importorskip("triton", reason="Triton is not installed")
from skiprnn.model.engines.triton import launch

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.float32, 1e-3) if ON_GPU else ("cpu", torch.float64, 1e-10)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    with triton_kernels():
        yield


def compared(cell, policy, inputs, hidden, layers, x, seed, lengths=None, state=None, **options):
    """Both engines' results on the same network and input."""
    return [
        results(
            network(cell, policy, inputs, hidden, layers, engine, seed, dtype=DTYPE, device=DEVICE, **options),
            x,
            seed,
            state,
            lengths,
        )
        for engine in ("triton", "reference")
    ]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_on_chip(cell, policy, ragged):
    """Also more rows than a tile has, a given state, and an input too wide for the time loop."""
    torch.manual_seed(0)
    batch, inputs = (3, 2) if ragged else (18, 6)
    x = torch.randn(batch, 4, inputs, dtype=DTYPE, device=DEVICE)
    lengths = torch.tensor([4, 3, 0]) if ragged else None
    state = random_state(cell, policy, batch, 5, DTYPE)
    state = [part.to(DEVICE) for part in state]
    ours, reference = compared(cell, policy, inputs, 5, 1, x, 3, lengths, state, bias=-1.0, slope_epoch=60)
    assert_equal(ours, reference, TOLERANCE)


@pytest.mark.parametrize(("layers", "policy"), [(1, "always"), (2, "skip"), (1, "selective")])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_read_block_by_block(cell, policy, layers, monkeypatch):
    monkeypatch.setattr(launch, "ON_CHIP", 0)
    assert launch.columns(launch.padded(19), DTYPE, resident=False) < 32  # several blocks
    torch.manual_seed(1)
    x = torch.randn(2, 4, 2, dtype=DTYPE, device=DEVICE)
    ours, reference = compared(cell, policy, 2, 19, layers, x, 1, torch.tensor([4, 2]), bias=-1.0)
    assert_equal(ours, reference, TOLERANCE)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_of_unequal_size(cell):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 2, dtype=DTYPE, device=DEVICE)
    assert_equal(*compared(cell, "skip", 2, [5, 18], 2, x, 1, bias=-1.0), TOLERANCE)


@pytest.mark.parametrize("q", [0.5, 0.25])
def test_exact_ties_of_the_gate(q):
    runs = []
    for engine in ("triton", "reference"):
        rnn = network("lstm", "skip", 1, 4, 1, engine, dtype=DTYPE, device=DEVICE)
        with torch.no_grad():
            rnn.policy.weight.zero_()
            rnn.policy.bias.fill_(torch.logit(torch.tensor(q, dtype=DTYPE)))
        runs.append(results(rnn, torch.ones(1, 6, 1, dtype=DTYPE, device=DEVICE), 2))
    if not ON_GPU:  # there the sigmoid is not exact to the last bit
        assert 0 < runs[1]["updates"].mean() < 1
        assert_equal(*runs, TOLERANCE)


def test_inference_equals_training():
    for policy in POLICIES:
        rnn = network("lstm", policy, 2, 9, 1, "triton", bias=-2.5, dtype=DTYPE, device=DEVICE)
        x = torch.randn(2, 5, 2, dtype=DTYPE, device=DEVICE)
        torch.manual_seed(1)
        trained = rnn(x)
        torch.manual_seed(1)
        with torch.no_grad():
            inferred = rnn(x)
        torch.testing.assert_close(trained[0].detach(), inferred[0])
        assert torch.equal(trained[2].detach(), inferred[2])


@pytest.mark.parametrize(
    ("policy", "hidden"), [("always", 9), ("always", 110), ("skip", 110), ("random_steps", 110), ("selective", 110)]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_half_precision_products_are_as_exact_as_tf32(cell, policy, hidden, monkeypatch):
    """fp16 operands, gradients far below its range included: what tf32's 10 bits of mantissa lose, 1e-3 at the most."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    assert launch.operands(torch.float32) == torch.float16
    torch.manual_seed(2)
    x = torch.randn(3, 8, 2, device=DEVICE)
    rnn = Recurrent(
        cell,
        policy,
        2,
        hidden,
        device=DEVICE,
        batch_first=True,
        **({"p_skip": 0.4} if policy == "random_steps" else {}),
    )
    if policy == "skip":
        rnn.policy.bias.data.fill_(-0.5)
    runs = []
    for engine in ("triton", "reference"):
        rnn.engine = engine
        rnn.zero_grad()
        torch.manual_seed(3)
        output, state, updates = rnn(x)
        ((output.sum() + entries(state)[0].square().sum() + 1e-2 * updates.sum()) * 1e-9).backward()
        gradients = {
            part: torch.cat([p.grad.flatten() for name, p in rnn.named_parameters() if name.startswith(part)])
            for part in ("layers.0.weight_ih", "layers.0.weight_hh", "layers.0.bias", "layers.0.initial", "policy")
            if part != "policy" or rnn.policy.learned
        }
        runs.append({"output": output.detach(), "updates": updates.detach()} | gradients)
    assert torch.equal(runs[0]["updates"], runs[1]["updates"])
    assert policy == "always" or 0.2 < runs[1]["updates"].mean() < 0.8
    errors = {name: float((runs[0][name] - value).norm() / value.norm()) for name, value in runs[1].items()}
    print(cell, policy, hidden, {name: f"{error:.1e}" for name, error in errors.items()})
    assert 0 < errors["output"] < 1e-3
    assert max(errors.values()) < 1e-3


@pytest.mark.parametrize(("policy", "layers"), [("random_steps", 1), ("skip", 2), ("selective", 1)])
def test_packed_runs_equal_single_ones(policy, layers):
    torch.manual_seed(3)
    networks = [network("gru", policy, 2, 5, layers, "triton", seed, dtype=DTYPE, device=DEVICE) for seed in range(3)]
    x = torch.randn(3, 2, 6, 2, dtype=DTYPE, device=DEVICE)
    outcomes = []
    for packed in (True, False):
        torch.manual_seed(4)
        calls = []
        for rnn, batch in zip(networks, x, strict=True):
            rnn.zero_grad()
            calls.append(rnn.prepare(batch))
        found = engines.run_packed("triton", calls) if packed else [triton.run(call) for call in calls]
        sum((run + 1) * (output.square().sum() + u.sum()) for run, (output, _, _, u) in enumerate(found)).backward()
        gradients = [parameter.grad for rnn in networks for parameter in rnn.parameters() if parameter.grad is not None]
        outcomes.append([output.detach() for output, *_ in found] + [gradient.clone() for gradient in gradients])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_never_interprets_and_says_what_it_cannot_do():
    x = torch.randn(1, 3, 2)
    assert SkipLSTM(2, 4).engine_for(x) != "triton"
    with pytest.raises(ValueError, match="up to 512 units"):
        LSTM(2, 513, engine="triton").engine_for(x)


@pytest.mark.parametrize(
    ("gates", "layers", "hidden", "programs", "refused"),
    [
        (4, 2, 512, 2, True),  # UCF-101 at a batch of 32
        (4, 1, 512, 32, True),
        (4, 1, 512, 33, False),  # a quarter of the processors
        (4, 2, 256, 2, False),  # few products a step
        (4, 2, 110, 1, False),
        (4, 1, 110, 1, False),  # the weights stay on the chip
    ],
)
def test_wide_layers_are_refused_where_they_use_a_small_part_of_the_gpu(gates, layers, hidden, programs, refused):
    half = torch.float16
    assert launch.wasteful(gates, layers, launch.padded(hidden), half, programs, processors=132) is refused


def test_auto_leaves_wide_layers_to_torch(monkeypatch):
    """On a GPU that is not there."""
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    rnn = Recurrent("lstm", "skip", 8, 512, 2, batch_first=True)
    with FakeTensorMode():
        small, large = torch.empty(32, 25, 8, device="cuda"), torch.empty(1024, 25, 8, device="cuda")
    assert "2 of the GPU's 132 processors" in triton.unsupported(rnn.cells, rnn.policy, small)
    assert engines.choose("auto", rnn.cells, rnn.policy, small) == "reference"
    assert engines.choose("auto", rnn.cells, rnn.policy, large) == "triton"


def compiled(architecture: int, variants: list[str]) -> list[dict]:
    """What the variants' kernels take, by compile_triton.py, in a process without the interpreter."""
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, script, str(architecture), *variants]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_compiled(architecture: int, variants: list[str]) -> None:
    """Raises AssertionError unless all kernels compile, and none spills registers in its time loop."""
    kernels = compiled(architecture, variants)
    assert len(kernels) == sum(2 if variant.endswith("train") else 1 for variant in variants)
    assert all(kernel["loops"] > 1 and kernel["registers"] > 32 for kernel in kernels), "no time loop was found"
    assert not [kernel for kernel in kernels if kernel["spills"]]


def test_kernels_compile_for_a_gpu():
    """The largest variant of each kernel, for an H100; all others and other GPUs: the slow test."""
    check_compiled(
        90,
        [
            "lstm-skip-1-110-infer",
            "lstm-selective-1-110-train",
            "gru-skip-1-110-train",
            "lstm-skip-2-110-train",
            "gru-skip-2-110-train",
            "lstm-selective-1-250-train",
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_variant_compiles(architecture):
    """Weights on the chip (110 units), streamed (250 units, 2 layers)."""
    one = [f"{cell}-{policy}-1-{hidden}" for cell, policy, hidden in product(["lstm", "gru"], POLICIES, [110, 250])]
    two = [f"{cell}-skip-2-{hidden}" for cell, hidden in product(["lstm", "gru"], [110, 250])]
    check_compiled(architecture, [f"{variant}-{task}" for variant in one + two for task in ("infer", "train")])

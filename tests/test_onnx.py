"""ONNX files against the network they come from, run by ONNX Runtime."""

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from skiprnn import LSTM, SALSTM, RandomSkipLSTM, Recurrent, SkipGRU, SkipLSTM
from skiprnn.benchmarks import cpu
from skiprnn.model.policies import Skip

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxruntime"))),
    reason="onnx or onnxruntime is not installed",
)


def session(path, **options):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run(opened, **inputs):
    """The outputs by name."""
    found = opened.run(None, {name: value.detach().numpy() for name, value in inputs.items()})
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


@needs_onnx
@pytest.mark.parametrize("sizes", [5, (5, 4), "both directions"])
@pytest.mark.parametrize("policy", ["always", "skip", "selective"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_file_computes_what_the_network_does(cell, policy, sizes, tmp_path):
    """Any batch and any number of steps, and continued from any state."""
    torch.manual_seed(1)
    options = {"batch_first": sizes != (5, 4), "bias": sizes != (5, 4), "bidirectional": isinstance(sizes, str)}
    rnn = Recurrent(cell, policy, 3, 5 if options["bidirectional"] else sizes, 1 if sizes == 5 else 2, **options)
    rnn.policy.set_epoch(60)
    for one in rnn.policy.modules():
        if isinstance(one, Skip):
            torch.nn.init.constant_(one.bias, -1.0)
    rnn.to_onnx(tmp_path / "network.onnx")
    opened = session(tmp_path / "network.onnx")
    state, carried = None, {}
    for batch, steps in ((1, 30), (3, 1), (3, 17), (3, 5)):
        if batch != 3 or steps == 1:
            state, carried = None, {}
        x = torch.randn(*((batch, steps) if rnn.batch_first else (steps, batch)), 3)
        output, state, updates = rnn(x, state)
        found = run(opened, x=x, **carried)
        torch.testing.assert_close(found["output"], output.detach())
        assert torch.equal(found["updates"], updates.detach())
        parts = rnn.unpack(state, batch)
        flat = [part for states, gate in parts for part in (*(entry for state in states for entry in state), *gate)]
        carried = {name.removeprefix("next."): part for name, part in found.items() if name.startswith("next.")}
        assert len(flat) == len(carried)
        for ours, theirs in zip(carried.values(), flat, strict=True):
            torch.testing.assert_close(ours, theirs.detach())
    assert policy == "always" or 0 < updates.mean() < 1


@needs_onnx
@pytest.mark.parametrize("kind", [SkipLSTM, SkipGRU])
def test_the_runtime_skips_what_the_network_skips(kind, tmp_path):
    """The products that ONNX Runtime's profile counts are those of the updates."""
    torch.manual_seed(2)
    rnn = kind(3, 5, batch_first=True)
    torch.nn.init.constant_(rnn.policy.bias, -1.5)
    rnn.to_onnx(tmp_path / "network.onnx")
    opened = session(tmp_path / "network.onnx", enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    x = torch.randn(1, 40, 3)
    updates = run(opened, x=x)["updates"].sum()
    events = json.loads(Path(opened.end_profiling()).read_text())
    ran = Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time"))
    assert 1 < updates < 20
    products = 3 if kind is SkipLSTM else 5  # with x, with h (of a GRU's candidate, with r * h), the gate's
    assert sum(ran[name] for name in ("Gemm", "FusedGemm", "MatMul")) == products * updates, ran
    assert ran["If"] == 40


@needs_onnx
def test_the_file_is_a_loop_of_any_length(tmp_path):
    import onnx

    SkipLSTM(3, 5, 2).to_onnx(tmp_path / "network.onnx")
    graph = onnx.load(tmp_path / "network.onnx").graph
    assert [node.op_type for node in graph.node].count("Scan") == 1
    assert len(graph.node) < 20
    assert [dimension.dim_param for dimension in graph.input[0].type.tensor_type.shape.dim][:2] == ["T", "B"]
    assert [entry.name for entry in graph.input] == ["x", "h.0", "c.0", "h.1", "c.1", "update_prob", "cum_update_prob"]
    SkipGRU(3, 5, bidirectional=True).to_onnx(tmp_path / "network.onnx")
    names = [entry.name for entry in onnx.load(tmp_path / "network.onnx").graph.input]
    assert names == ["x", *(f"{name}.{n}" for n in (0, 1) for name in ("h", "update_prob", "cum_update_prob"))]


@needs_onnx
@pytest.mark.parametrize(
    ("rnn", "message"),
    [
        (RandomSkipLSTM(3, 5), "RandomSkipLSTM cannot become an ONNX file: its policy draws at random"),
        (SALSTM(3, 5, dtype=torch.float64), "its parameters are torch.float64: convert it to float32"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_the_file(rnn, message, tmp_path):
    (tmp_path / "network.onnx").write_text("as it was")
    with pytest.raises(ValueError, match=message):
        rnn.to_onnx(tmp_path / "network.onnx")
    assert (tmp_path / "network.onnx").read_text() == "as it was"
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


def test_without_onnx_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'skiprnn\[onnx\]'"):
        LSTM(3, 5).to_onnx(tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_the_bench_compares_with_the_runtimes_own_operator(kind):
    """Of torch's weights, so that both compute the same."""
    module = kind(3, 5, 2)
    x = torch.randn(7, 2, 3)
    torch.testing.assert_close(cpu.onnx_runtime(cpu.onnx_model(module))(x), module(x)[0].detach())
    functions = cpu.candidates(kind.__name__.lower(), (1, 6, 1, 4, 1), cpu.infer, False)
    assert {"ONNX Runtime", "skip 10 %, ONNX Runtime", "skip 10 %, bfloat16"} <= functions.keys()
    for function in functions.values():
        function()

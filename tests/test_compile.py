"""torch.compile, torch.export, torch.func and torch.jit, as a user of nn.LSTM would call them."""

import io
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from skiprnn import GRU, LSTM, Recurrent, SkipGRU, SkipLSTM
from skiprnn.model.engines import reference
from skiprnn.model.engines.native import build
from skiprnn.model.policies import POLICIES, Skip

requires_native = pytest.mark.skipif(not build.available(), reason="no C++ compiler")
LEARNED = ["always", "skip", "selective"]


def network(cell, policy, engine="auto", layers=2, **options):
    """One that skips some steps."""
    torch.manual_seed(1)
    if POLICIES[policy].draws:
        options["p_skip"] = 0.6
    rnn = Recurrent(cell, policy, 3, 5, layers, batch_first=True, engine=engine, **options)
    if policy == "skip":
        nn.init.constant_(rnn.policy.bias, -1.0)
    return rnn


def flat(rnn, result, batch):
    """Outputs, decisions, states and the gate of rnn(x)."""
    output, state, updates = result
    ((states, gate),) = rnn.unpack(state, batch)
    return [output, updates, *(entry for entries in states for entry in entries), *gate]


def compare_compiled(rnn, backend):
    """Whole graphs give what the module gives, gradients too, from an initial and from a returned state."""
    torch._dynamo.reset()
    compiled = torch.compile(rnn, fullgraph=True, backend=backend)
    x, lengths = torch.randn(4, 12, 3), torch.tensor([12, 3, 0, 7])
    found = []
    for run in (compiled, rnn):
        torch.manual_seed(3)  # torch's own generator in both
        first = run(x, None, lengths)
        second = run(x, first[1])
        rnn.zero_grad()
        (second[0].square().sum() + second[2].sum()).backward()
        gradients = [parameter.grad for parameter in rnn.parameters() if parameter.grad is not None]
        found.append([*flat(rnn, first, 4), *flat(rnn, second, 4), *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@requires_native
@pytest.mark.parametrize(("cell", "policy"), [("lstm", "skip"), ("gru", "selective"), ("lstm", "random_steps")])
def test_compile_without_a_graph_break(cell, policy):
    compare_compiled(network(cell, policy), "aot_eager")


@pytest.mark.slow
@requires_native
def test_inductor():
    compare_compiled(network("lstm", "skip"), "inductor")


FIRST = """
import sys, torch
from skiprnn import SkipLSTM
compiled = torch.compile(SkipLSTM(3, 5), fullgraph=True, backend="eager")
assert compiled(torch.randn(6, 2, 3))[0].shape == (6, 2, 5)
"""


@pytest.mark.slow
def test_compile_before_anything_has_run():
    """The engine is looked for while the graph is traced."""
    subprocess.run([sys.executable, "-c", FIRST], check=True)


def test_importing_the_package_does_not_import_the_compiler():
    command = "import sys, skiprnn; assert 'torch._dynamo' not in sys.modules and 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


@requires_native
@pytest.mark.parametrize("policy", LEARNED)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_export_saved_loaded_and_run(cell, policy):
    """For any batch and any number of steps."""
    rnn = network(cell, policy)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    program = torch.export.export(rnn, (torch.randn(2, 9, 3),), dynamic_shapes=({0: batch, 1: steps},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((2, 9, 3), (5, 4, 3), (1, 30, 3)):
        x = torch.randn(shape)
        for ours, theirs in zip(*(flat(rnn, run(x), len(x)) for run in (loaded, rnn)), strict=True):
            if ours.shape != (len(x), 1):  # the gate is no output, see below
                torch.testing.assert_close(ours, theirs)


class Continued(nn.Module):
    """What an exported program takes and gives, to go on from."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h, c, update_prob, cum_update_prob):
        output, (h, c), updates = self.rnn(x, (h, c, update_prob, cum_update_prob))
        return output, updates, h, c, *h.gate_state


@requires_native
def test_an_exported_program_continues_with_the_gate_as_its_input_and_output():
    rnn = network("lstm", "skip", layers=1)
    ((states, gate),) = rnn.unpack(None, 2)
    begin = [*(entry[None].detach() for entry in states[0]), *(part.detach() for part in gate)]
    x = torch.randn(2, 20, 3)
    any_steps = {1: torch.export.Dim("steps")}, *[None] * 4
    program = torch.export.export(Continued(rnn), (torch.randn(2, 9, 3), *begin), dynamic_shapes=any_steps).module()
    output, _, updates = rnn(x)
    first = program(x[:, :9], *begin)
    second = program(x[:, 9:], *first[2:])
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), output)
    assert torch.equal(torch.cat([first[1], second[1]], 1), updates)


@requires_native
def test_the_docs_on_deploying_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "deploying.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "to_onnx" not in block or find_spec("onnx"):
            exec(compile(block, "docs/deploying.md", "exec"), names)
    assert names["output"].shape == (120, 1, 64)


def test_torch_jit_is_told_where_to_go():
    for wrapped in (SkipLSTM(3, 5), nn.Sequential(SkipLSTM(3, 5))):
        with pytest.raises(RuntimeError, match=r"use torch.export.export\(rnn, \(x,\)\), or rnn.to_onnx"):
            torch.jit.script(wrapped)
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.trace(GRU(3, 5), torch.randn(4, 2, 3))


def gradient(rnn, parameters, x):
    """Of a loss in all parameters."""

    def loss(parameters):
        output, _, updates = torch.func.functional_call(rnn, parameters, (x,))
        return output.square().sum() + updates.sum()

    return torch.func.grad(loss)(parameters)


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=requires_native)])
@pytest.mark.parametrize("policy", POLICIES)
def test_vmap_over_sequences_and_over_weights(policy, engine):
    """Per-sample gradients, and an ensemble's, are those of a loop."""
    rnn = network("gru", policy, engine, dtype=torch.float64)
    ensemble = [dict(network("gru", policy, engine, dtype=torch.float64).named_parameters()) for _ in range(3)]
    for number, parameters in enumerate(ensemble):
        for parameter in parameters.values():
            parameter.data += 0.1 * number
    stacked = {name: torch.stack([one[name] for one in ensemble]).detach() for name in ensemble[0]}
    xs = torch.randn(3, 2, 8, 3, dtype=torch.float64)
    torch.manual_seed(5)
    found = torch.vmap(lambda p, x: gradient(rnn, p, x), randomness="same")(stacked, xs)
    for number, x in enumerate(xs):
        torch.manual_seed(5)
        expected = gradient(rnn, {name: part[number] for name, part in stacked.items()}, x)
        for name, part in found.items():
            torch.testing.assert_close(part[number], expected[name])


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_mode_agrees_with_reverse_mode(policy):
    """<w, J v> = <J^T w, v>, of the reference engine."""
    rnn = network("lstm", policy, "reference", dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in rnn.named_parameters()}

    def call(parameters):
        torch.manual_seed(5)
        output, _, updates = torch.func.functional_call(rnn, parameters, (x,))
        return torch.cat([output.flatten(), updates.flatten()])

    x = torch.randn(2, 8, 3, dtype=torch.float64)
    v = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    output, along = torch.func.jvp(call, (parameters,), (v,))
    w = torch.randn_like(output)
    back = torch.func.vjp(call, parameters)[1](w)[0]
    assert along.any()
    torch.testing.assert_close((w * along).sum(), sum((back[name] * v[name]).sum() for name in v))


@pytest.mark.parametrize("policy", POLICIES)
def test_second_derivatives_are_those_of_the_formula(policy, monkeypatch):
    """Those of u * new + (1 - u) * old in plain autograd, of the reference engine."""
    rnn = network("gru", policy, "reference", dtype=torch.float64)
    x = torch.randn(2, 8, 3, dtype=torch.float64)

    def second():
        torch.manual_seed(5)
        output, _, updates = rnn(x)
        loss = output.square().sum() + updates.sum()
        first = torch.autograd.grad(loss, list(rnn.parameters()), create_graph=True, allow_unused=True)
        total = sum(part.square().sum() for part in first if part is not None)
        return torch.autograd.grad(total, list(rnn.parameters()), allow_unused=True)

    ours = second()
    monkeypatch.setattr(
        reference,
        "mix",
        lambda u, news, olds: tuple(u * new + (1 - u) * old for new, old in zip(news, olds, strict=True)),
    )
    for found, expected in zip(ours, second(), strict=True):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-10)


@requires_native
@pytest.mark.parametrize("kind", [LSTM, SkipGRU])
def test_what_the_fast_engines_cannot_differentiate_they_say(kind):
    rnn = kind(3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives; engine='reference' has"):
        torch.func.jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))
    with (
        pytest.raises(RuntimeError, match="no forward-mode derivatives; engine='reference' has"),
        torch.no_grad(),
        forward_ad.dual_level(),
    ):
        rnn(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
    (first,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; engine='reference' has"):
        first.sum().backward()


def test_a_scalar_bias_of_an_older_checkpoint_loads():
    rnn = SkipLSTM(3, 5)
    older = {name: part.reshape(()) if name == "policy.bias" else part for name, part in rnn.state_dict().items()}
    other = nn.ModuleDict({"rnn": SkipLSTM(3, 5)})
    nn.init.constant_(other["rnn"].policy.bias, -3.0)
    other.load_state_dict({f"rnn.{name}": part for name, part in older.items()})
    assert torch.equal(other["rnn"].policy.bias, rnn.policy.bias)
    assert isinstance(rnn.policy, Skip)
    assert all(parameter.dim() for parameter in rnn.parameters())

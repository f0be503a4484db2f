"""The other engines against the reference engine, which defines the meaning; streaming against whole sequences."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import entries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skiprnn import Recurrent, SkipGRU, SkipLSTM
from skiprnn.model import engines
from skiprnn.model.engines import operator
from skiprnn.model.engines.native import build
from skiprnn.model.engines.native import operator as native
from skiprnn.model.policies import POLICIES

requires_native = pytest.mark.skipif(not build.available(), reason="no C++ compiler")
VARIANTS = list(build.VARIANTS)[list(build.VARIANTS).index(build.best_variant()) :] if build.available() else []


def network(cell, policy, inputs, hidden, layers, engine, seed=0, bias=0.0, slope_epoch=0, **options):
    """A network with random parameters, the same for the same seed; `bias` moves Skip's update rate."""
    if policy.startswith("random"):
        options["p_skip"] = 0.4
    rnn = Recurrent(cell, policy, inputs, hidden, layers, engine=engine, batch_first=True, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if policy == "skip":
            rnn.policy.bias.fill_(bias)
    rnn.policy.set_epoch(slope_epoch)
    return rnn


def results(rnn, x, seed, state=None, lengths=None, input_gradient=True) -> dict[str, torch.Tensor]:
    """Everything a run gives, and the gradient of a random combination of all of it in everything that has one."""
    x = x.detach().requires_grad_(input_gradient)
    given = [part.detach().requires_grad_() for part in state or []]
    torch.manual_seed(seed)  # the random policies' draws
    output, after, updates = rnn(x, given or None, lengths)
    named = {"output": output, "updates": updates} | {f"state {i}": part for i, part in enumerate(entries(after))}
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for value in named.values():
        if isinstance(value, tuple):
            value = torch.cat(value, -1)
        weight = torch.randn(value.shape, generator=generator, dtype=x.dtype)
        if value.requires_grad:
            loss = loss + (value * weight).sum()
    loss.backward()
    named = {k: torch.cat(v, -1) if isinstance(v, tuple) else v.detach() for k, v in named.items()}
    named["gradient of x"] = x.grad
    named |= {f"gradient of state {i}": part.grad for i, part in enumerate(given)}
    return named | {f"gradient of {name}": parameter.grad for name, parameter in rnn.named_parameters()}


def assert_equal(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    assert torch.equal(actual["updates"], expected["updates"]), "updates differ"
    for name, value in expected.items():
        if value is None or actual[name] is None:  # no gradient at all equals a gradient of zeros
            assert all(v is None or not v.any() for v in (value, actual[name])), name
            continue
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def random_state(cell, policy, batch, hidden, dtype=torch.float64):
    def entry():
        return torch.stack([torch.randn(batch, hidden, dtype=dtype)])

    gate = (torch.rand(batch, 1, dtype=dtype), torch.rand(batch, 1, dtype=dtype) / 2) if policy == "skip" else ()
    return (entry(), *([entry()] if cell == "lstm" else []), *gate)


@requires_native
@settings(max_examples=120, deadline=None)
@given(
    cell=st.sampled_from(["lstm", "gru"]),
    policy=st.sampled_from(list(POLICIES)),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 14), st.integers(1, 5), st.integers(1, 19), st.integers(1, 3)),
    bias=st.sampled_from([-4.0, -2.5, -1.5, -0.5, 0.0, 2.0]),
    blank=st.booleans(),
    alike=st.booleans(),
    ragged=st.booleans(),
    given_state=st.booleans(),
    epoch=st.sampled_from([0, 60]),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_equals_reference(cell, policy, sizes, bias, blank, alike, ragged, given_state, epoch, wide, seed):
    batch, steps, inputs, hidden, layers = sizes
    torch.manual_seed(seed)
    x = torch.randn(batch, steps, inputs, dtype=torch.float64)
    if blank:  # long runs of the same input, as MNIST's
        x = x * (x > 0.8)
    for row, common in zip(x, torch.randint(0, steps + 1, (batch,)), strict=True) if alike else ():
        row[:common] = x[0, :common]  # computed once, unless x has a gradient or the state differs
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    state = random_state(cell, policy, batch, hidden) if given_state and layers == 1 else None
    runs = []
    for engine in ("reference", "native"):
        rnn = network(cell, policy, inputs, hidden, layers, engine, seed, bias, epoch, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "WIDE", 0 if wide else native.WIDE)  # x projected in one product, or step by step
            runs.append(results(rnn, x, seed, state, lengths, input_gradient=not alike))
    assert_equal(runs[1], runs[0], 1e-10)


@requires_native
@settings(max_examples=120, deadline=None)
@given(
    cell=st.sampled_from(["lstm", "gru"]),
    policy=st.sampled_from(list(POLICIES)),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    place=st.sampled_from(["x", "state", *range(12)]),  # or in the parameter of this number
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 19), st.integers(1, 2)),
    alike=st.booleans(),
    ragged=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_engines_agree_on_nan_and_inf(cell, policy, value, place, sizes, alike, ragged, wide, seed):
    """Where one number is nan or infinite: the same outputs, states and updates, nan and infinite at the same places.

    Gradients are equal where the reference's are finite. Elsewhere none is finite, but at steps that are skipped: there
    plain autograd's 0 * nan is nan, the other engines pass by.
    """
    batch, steps, inputs, hidden, layers = sizes
    torch.manual_seed(seed)
    x = torch.randn(batch, steps, inputs, dtype=torch.float64)
    for row, common in zip(x, torch.randint(0, steps + 1, (batch,)), strict=True) if alike else ():
        row[:common] = x[0, :common]
    state = random_state(cell, policy, batch, hidden) if place == "state" and layers == 1 else None
    spoil = {"x": [x], "state": [part for part in state or [] if part is not None]}.get(place, [])
    if spoil:
        spoil[seed % len(spoil)].view(-1)[seed % spoil[seed % len(spoil)].numel()] = value
    lengths = torch.randint(1, steps + 1, (batch,)) if ragged else None
    runs = []
    for engine in ("reference", "native"):
        rnn = network(cell, policy, inputs, hidden, layers, engine, seed, -1.0, dtype=torch.float64)
        if isinstance(place, int):
            parameters = list(rnn.parameters())
            parameter = parameters[place % len(parameters)].detach().view(-1)
            parameter[seed % len(parameter)] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "WIDE", 0 if wide else native.WIDE)
            runs.append(results(rnn, x, seed, state, lengths, input_gradient=not alike))
    skips = policy in ("random_steps", "skip") or ragged
    for name, expected in runs[0].items():
        actual = runs[1][name]
        if expected is None or actual is None:
            assert all(gradient is None or not gradient.any() for gradient in (expected, actual)), name
        elif name.startswith("gradient"):
            finite = expected.isfinite()
            assert torch.allclose(actual[finite], expected[finite], rtol=1e-8, atol=1e-9), name
            assert skips or not actual[~finite].isfinite().any(), name
        else:
            assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True), name


@pytest.mark.parametrize("engine", ["reference", "compact", pytest.param("native", marks=requires_native)])
@pytest.mark.parametrize("policy", ["random_steps", "skip"])
def test_a_skipped_sample_may_be_nan(policy, engine):
    rnn = network("lstm", policy, 2, 6, 1, engine, bias=-2.0)
    x = torch.randn(3, 20, 2)
    with torch.no_grad():
        torch.manual_seed(1)
        expected, _, updates = rnn(x)
        x[updates == 0] = torch.nan
        torch.manual_seed(1)
        output, *_ = rnn(x)
    assert 0.1 < updates.mean() < 0.9
    assert torch.equal(output, expected)


@pytest.mark.parametrize("engine", ["reference", "compact", pytest.param("native", marks=requires_native)])
def test_a_gate_that_is_nan_shows(engine):
    """In all that follows, the updates included."""
    rnn = network("gru", "skip", 1, 3, 1, engine, bias=-1.0)
    x = torch.ones(2, 9, 1)
    x[0, 0] = torch.nan
    with torch.no_grad():
        output, state, updates = rnn(x)
    assert updates[0].isnan().tolist() == [False, *[True] * 8]
    assert output[0].isnan().all()
    assert all(part.select(-2, 0).isnan().all() for part in entries(state))
    assert output[1].isfinite().all()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", ["random_steps", "skip"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compact_equals_reference(cell, policy, layers, ragged):
    x = torch.randn(5, 30, 2, dtype=torch.float64)
    lengths = torch.tensor([30, 0, 7, 1, 29]) if ragged else None
    runs = []
    for engine in ("reference", "compact"):
        rnn = network(cell, policy, 2, 6, layers, engine, bias=-1.5, dtype=torch.float64)
        if policy == "random_steps":  # its skips carry no gradient, all that remain are exact
            runs.append(results(rnn, x, 7, lengths=lengths))
        else:
            with torch.no_grad():
                output, state, updates = rnn(x, lengths=lengths)
            runs.append({"output": output, "updates": updates} | dict(enumerate(entries(state))))
    assert 0 < runs[0]["updates"].mean() < 1
    assert_equal(runs[1], runs[0], 1e-10)


def test_compact_computes_only_the_rows_that_update(monkeypatch):
    rnn = network("lstm", "skip", 2, 6, 1, "compact", bias=-1.5)
    rows, forward = [], type(rnn.cells[0]).forward
    monkeypatch.setattr(type(rnn.cells[0]), "forward", lambda cell, x, s: rows.append(len(x)) or forward(cell, x, s))
    with torch.no_grad():
        updates = rnn(torch.randn(5, 30, 2))[2]
    assert sum(rows) == updates.sum()


@requires_native
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_of_unequal_size(cell):
    x = torch.randn(3, 12, 2, dtype=torch.float64)
    runs = [
        results(network(cell, "skip", 2, [5, 18], 2, engine, bias=-1.0, dtype=torch.float64), x, 1)
        for engine in ("reference", "native")
    ]
    assert_equal(runs[1], runs[0], 1e-10)


@requires_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ["skip", "selective"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_variant_in_float32_and_float64(cell, policy, variant, monkeypatch):
    library = build.load(variant)
    monkeypatch.setattr(build, "load", lambda: library)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        x = torch.randn(9, 30, 3, dtype=dtype)
        expected = results(network(cell, policy, 3, 20, 1, "reference", bias=-1.0, dtype=dtype), x, 5)
        actual = results(network(cell, policy, 3, 20, 1, "native", bias=-1.0, dtype=dtype), x, 5)
        if torch.equal(actual["updates"], expected["updates"]):  # rounding may tip a decision in float32
            assert_equal(actual, expected, tolerance)
        else:
            assert dtype == torch.float32


@requires_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ["always", "skip", "selective"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bfloat16_weights(cell, policy, variant, monkeypatch):
    """One sequence, whose weights are then read in halves; of two they are not, and the sums are the same."""
    library = build.load(variant)
    monkeypatch.setattr(build, "load", lambda: library)
    for hidden in (5, 16, 37, 70):  # panels of one vector, of two, and some side by side
        rnn = network(cell, policy, 3, hidden, 2, "native", bias=-1.0)
        exact, reference = rnn.cells[1].weight_hh.clone(), network(cell, policy, 3, hidden, 2, "reference")
        assert rnn.round_weights() is rnn
        reference.load_state_dict(rnn.state_dict())
        assert torch.equal(rnn.cells[1].weight_hh, exact.bfloat16().float())
        assert not torch.equal(rnn.cells[1].weight_hh, exact)
        x = torch.randn(1, 12, 3)
        with torch.no_grad():
            (one, _, updates), (two, _, _), (expected, _, theirs) = rnn(x), rnn(x.expand(2, -1, -1)), reference(x)
        assert torch.equal(one[0], two[0])
        if torch.equal(updates, theirs):  # rounding may tip a decision
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)  # bfloat16 alone would differ by 1e-2
        else:
            assert policy != "always"


@pytest.mark.parametrize("engine", [pytest.param("native", marks=requires_native), "batched"])
@pytest.mark.parametrize("q", [0.5, 0.25, 0.125])
def test_exact_ties_of_the_gate(q, engine):
    """A constant q that reaches 0.5 exactly: half to even is no update, and min(q, 1 - s) halves its gradient."""
    runs = []
    for one in ("reference", engine):
        rnn = network("lstm", "skip", 1, 4, 1, one, dtype=torch.float64)
        with torch.no_grad():
            rnn.policy.weight.zero_()
            rnn.policy.bias.fill_(torch.logit(torch.tensor(q, dtype=torch.float64)))
        runs.append(results(rnn, torch.ones(2, 25, 1, dtype=torch.float64), 2))
    assert 0 < runs[0]["updates"].mean() < 1
    assert_equal(runs[1], runs[0], 1e-10)


@requires_native
def test_two_forwards_before_a_backward():
    torch.manual_seed(0)
    first, second = torch.randn(2, 40, 300, 2, dtype=torch.float64)  # large enough to reuse memory
    rnn = network("lstm", "skip", 2, 16, 1, "native", bias=-1.0, dtype=torch.float64)
    separate = []
    for x in (first, second):
        rnn.zero_grad()
        rnn(x)[0].square().sum().backward()
        separate.append([p.grad.clone() for p in rnn.parameters()])
    rnn.zero_grad()
    losses = [rnn(x)[0].square().sum() for x in (first, second)]
    for loss in losses:
        loss.backward()
    for parameter, one, two in zip(rnn.parameters(), *separate, strict=True):
        torch.testing.assert_close(parameter.grad, one + two)


@requires_native
def test_threads_change_nothing_but_rounding():
    x = torch.randn(150, 20, 2, dtype=torch.float64)  # more rows than one worker takes
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(network("gru", "skip", 2, 9, 1, "native", bias=-1.0, dtype=torch.float64), x, 3))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_equal(run, runs[0], 1e-12)


@requires_native
def test_inference_equals_training():
    for policy in POLICIES:
        rnn = network("lstm", policy, 2, 9, 1, "native", bias=-1.0)
        x = torch.randn(5, 30, 2)
        torch.manual_seed(1)
        trained = rnn(x)
        torch.manual_seed(1)
        with torch.no_grad():
            inferred = rnn(x)
        assert trained[0].requires_grad
        assert not inferred[0].requires_grad
        assert torch.equal(trained[0], inferred[0])
        assert torch.equal(trained[2], inferred[2])


@requires_native
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", ["always", "skip", "selective"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sequences_that_begin_alike(cell, policy, layers, ragged):
    """What they have in common is computed once; each row parts from the first at another step, one never."""
    x = torch.randn(6, 14, 2, dtype=torch.float64)
    for row, common in enumerate([14, 0, 1, 6, 9, 14]):
        x[row, :common] = x[0, :common]
    lengths = torch.tensor([13, 14, 2, 5, 14, 11]) if ragged else None
    for bias in (-1.5, 0.5):
        runs = []
        for engine in ("reference", "native"):
            rnn = network(cell, policy, 2, 7, layers, engine, 3, bias, dtype=torch.float64)
            runs.append(results(rnn, x, 5, lengths=lengths, input_gradient=False))
        assert_equal(runs[1], runs[0], 1e-10)


@requires_native
def test_an_expanded_state_has_a_gradient_for_each_row():
    rnn = network("gru", "always", 2, 5, 1, "native")
    state = torch.randn(1, 1, 5).expand(1, 3, 5).requires_grad_()
    rnn(torch.ones(3, 4, 2), state)[0][1].sum().backward()
    assert state.grad[0, 1].any()
    assert not state.grad[0, [0, 2]].any()


@requires_native
@pytest.mark.parametrize(("hidden", "dtype"), [(37, torch.float32), (16, torch.float32), (19, torch.float64)])
def test_a_large_output_is_that_of_its_parts(hidden, dtype):
    """It is written past the cache."""
    rnn = network("gru", "skip", 1, hidden, 1, "native", bias=-1.0, dtype=dtype)
    x = torch.randn(48, (1 << 24) // (48 * hidden * dtype.itemsize) + 7, 1, dtype=dtype)
    lengths = torch.randint(0, x.shape[1] + 1, (48,))
    with torch.no_grad():
        output, _, updates = rnn(x, lengths=lengths)
        parts = [rnn(x[b : b + 6], lengths=lengths[b : b + 6]) for b in range(0, 48, 6)]
    assert output.nbytes >= 1 << 24 > parts[0][0].nbytes
    assert torch.equal(output, torch.cat([part[0] for part in parts]))
    assert 0.1 < updates.mean() < 0.9


@requires_native
def test_func_grad_sees_an_ordinary_operator():
    rnn = network("gru", "skip", 2, 5, 1, "native", bias=-1.0, dtype=torch.float64)
    x = torch.randn(3, 20, 2, dtype=torch.float64)

    def loss(parameters, x):
        output, _, updates = torch.func.functional_call(rnn, parameters, (x,))
        return output.square().sum() + updates.sum()

    gradients = torch.func.grad(loss)(dict(rnn.named_parameters()), x)
    loss(dict(rnn.named_parameters()), x).backward()
    for name, parameter in rnn.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@requires_native
@pytest.mark.parametrize("states", [3, 1])
@pytest.mark.parametrize("policy", ["skip", "random_neurons", "selective"])
def test_opcheck(policy, states):
    """With a state for each sequence, or one for all."""

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    gate = [torch.rand(states, dtype=torch.float64, requires_grad=True) for _ in range(2)] if policy == "skip" else []
    policy_weights = {
        "skip": [tensor(4), tensor()],
        "selective": [tensor(4, 2), tensor(4), tensor(4), torch.ones((), dtype=torch.float64)],
    }.get(policy, [])
    draw = torch.ones(3, 6, 4, dtype=torch.float64) if policy == "random_neurons" else None
    arguments = (
        "native",
        "lstm",
        policy,
        tensor(3, 6, 2).requires_grad_(states == 3),
        [tensor(states, 4), tensor(states, 4)],
        [tensor(16, 2), tensor(16, 4), tensor(16)],
        gate,
        policy_weights,
        draw,
        torch.tensor([6, 2, 4]),
        True,
    )
    # the saved buffers are written only as far as there were updates, so their contents can't be compared
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.recurrence, arguments, test_utils=tests)


@requires_native
def test_one_state_for_all_sequences_rules_out_a_gradient_of_x():
    weights = [torch.randn(9, 2), torch.randn(9, 3), torch.randn(9)]
    x = torch.randn(4, 5, 2, requires_grad=True)
    output, *_ = operator.recurrence(
        "native", "gru", "always", x, [torch.zeros(1, 3)], weights, [], [], None, None, True
    )
    with pytest.raises(RuntimeError, match="a state for each sequence where x has a gradient"):
        output.sum().backward()


@requires_native
def test_the_cpp_side_knows_the_same_cells_and_policies():
    """Enumerations, gates and the fields of its structs, in the same order."""
    header = {name: (build.FOLDER / f"{name}.h").read_text() for name in ("problem", "cells")}

    def enumeration(declaration: str, file: str) -> list[str]:
        return [
            name.strip().removeprefix("k")
            for name in re.search(declaration + r" \{(.*?)\}", header[file])[1].split(",")
        ]

    def camel(name: str) -> str:
        return "".join(part.capitalize() for part in name.split("_"))

    assert enumeration("enum class Cell", "problem") == [camel(name) for name in operator.CELLS]
    assert enumeration("enum class Policy", "problem") == [camel(name) for name in operator.POLICIES]
    for cell in operator.CELLS.values():
        assert enumeration(f"enum {cell.name.capitalize()}Gate", "cells") == [camel(gate) for gate in cell.gates]
    for struct, mirror in (("SkiprnnLayer", native.LayerStruct), ("SkiprnnProblem", native.ProblemStruct)):
        body = re.sub(r"//.*", "", re.search(rf"struct {struct} \{{(.*?)\}};", header["problem"], re.DOTALL)[1])
        fields = [re.search(r"(\w+)\s*$", part)[1] for part in re.split("[,;]", body) if part.strip()]
        assert fields == [name for name, _ in mirror._fields_]


@requires_native
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rnn: setattr(rnn.cells[0], "weight_hh", nn.Parameter(torch.zeros(12, 3))),
            "weight_hh .* got .*(12, 3)",
        ),
        (lambda rnn: setattr(rnn.policy, "weight", nn.Parameter(torch.zeros(5))), "policy_weight .* got .*(5,)"),
        (lambda rnn: rnn.policy.double(), "policy_weight .* got torch.float64"),
    ],
)
def test_no_pointer_is_handed_over_unchecked(spoil, message):
    rnn = SkipGRU(2, 4, engine="native", batch_first=True)
    spoil(rnn)
    with pytest.raises(ValueError, match="the native engine needs " + message):
        rnn(torch.zeros(1, 3, 2))


@requires_native
def test_parameters_may_be_strided():
    rnn, plain = SkipGRU(2, 4, engine="native", batch_first=True), SkipGRU(2, 4, engine="reference", batch_first=True)
    plain.load_state_dict(rnn.state_dict())
    rnn.cells[0].weight_hh = nn.Parameter(rnn.cells[0].weight_hh.detach().T.contiguous().T)
    x = torch.randn(3, 6, 4)[..., ::2]
    torch.testing.assert_close(rnn(x)[0], plain(x)[0])


@requires_native
def test_auto_takes_what_serves():
    x = torch.randn(2, 5, 3)
    assert SkipLSTM(3, 4).engine_for(x) == "native"
    assert SkipLSTM(3, 4, engine="reference").engine_for(x) == "reference"
    with pytest.raises(ValueError, match="candidates that were not taken"):
        SkipLSTM(3, 4, engine="compact", batch_first=True)(x)
    with pytest.raises(ValueError, match="unknown engine"):
        SkipLSTM(3, 4, engine="nativ")
    assert set(engines.ENGINES) == {"reference", "compact", "native", "batched", "triton", "cuda"}


NO_COMPILER = """
import warnings, torch
from skiprnn import SkipLSTM
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        rnn = SkipLSTM(2, 4, batch_first=True)
        rnn(torch.randn(2, 5, 2))[0].sum().backward()
assert rnn.engine_for(torch.randn(2, 5, 2)) == "reference"
with torch.no_grad():
    assert rnn.engine_for(torch.randn(2, 5, 2)) == "compact"
ours = [str(w.message) for w in caught if "native engine" in str(w.message)]
assert len(ours) == 1, ours
assert "slower" in ours[0]
"""


def test_without_a_compiler_one_warning_and_plain_torch(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "SKIPRNN_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", NO_COMPILER], env=environment, check=True)


@pytest.mark.parametrize("engine", ["reference", pytest.param("native", marks=requires_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [None, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("kind", [SkipLSTM, SkipGRU])
def test_stream_equals_batch_and_reads_only_what_it_needs(kind, q, dtype, engine):
    torch.manual_seed(4)
    rnn = kind(2, 6, engine=engine, dtype=dtype, batch_first=True)
    with torch.no_grad():
        rnn.policy.bias.fill_(-1.0)
        if q is not None:  # exact ties: 0.5 and 0.25 reach a half exactly
            rnn.policy.weight.zero_()
            rnn.policy.bias.fill_(torch.logit(torch.tensor(q, dtype=dtype)))
    x = torch.randn(1, 60, 2, dtype=dtype)
    output, state, updates = rnn(x)
    stream = rnn.stream()
    t, read = 0, []
    while t < x.shape[1]:
        read.append(t)
        pushed = stream.push(x[0, t])
        passing = min(pushed.unneeded, x.shape[1] - t - 1)
        torch.testing.assert_close(pushed.output, output[0, t + passing].detach())
        stream.skip(passing)
        t += 1 + passing
    assert read == updates[0].nonzero().flatten().tolist()
    for ours, theirs in zip(entries(stream.state), entries(state), strict=True):
        assert torch.allclose(ours, theirs)
    with pytest.raises(ValueError, match="can skip"):
        stream.skip(stream.unneeded + 1)


def test_stream_ignores_unneeded_samples():
    rnn = SkipLSTM(1, 4, batch_first=True)
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.fill_(-2.0)
    stream = rnn.stream()
    first = stream.push(torch.ones(1))
    assert first.unneeded > 0
    second = stream.push(torch.full((1,), 9.0))
    assert second.unneeded == first.unneeded - 1
    assert torch.equal(second.output, first.output)

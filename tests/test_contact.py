"""First contact: an engine that is wrong, fails or brings its process down on a device is not used there."""

import json
import warnings
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from skiprnn import Recurrent
from skiprnn.model import engines
from skiprnn.model.engines import __main__, contact, operator, trial

BATCHED = operator.KERNELS["batched"]
FEW = [contact.Variant("lstm", "skip", 2), contact.Variant("gru", "selective", 1)]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No verdict is known; gives the cache folder."""
    monkeypatch.setenv("SKIPRNN_CACHE", str(tmp_path))
    contact.refused.cache_clear()
    yield tmp_path
    contact.refused.cache_clear()


def test_all_variants_are_covered():
    assert set(contact.VARIANTS) == {
        contact.Variant(*one)
        for one in product(("lstm", "gru"), ("always", "random_steps", "skip", "random_neurons", "selective"), (1, 2))
    }


def with_kernels(monkeypatch, **changed):
    monkeypatch.setitem(operator.KERNELS, "batched", BATCHED._replace(**changed))


def test_a_right_engine_passes(fresh):
    for tested in FEW:
        assert 0 < trial.check("batched", "cpu", tested) < 1e-5


def test_wrong_outputs_wrong_gradients_and_failures_are_found(fresh, monkeypatch):
    def wrong_output(problem, save):
        outputs = BATCHED.forward(problem, save)
        return outputs._replace(output=outputs.output * 1.01)

    def wrong_gradient(*arguments):
        gradients = BATCHED.backward(*arguments)
        return gradients._replace(weights=[weight * 1.01 for weight in gradients.weights])

    def wrong_decisions(problem, save):
        outputs = BATCHED.forward(problem, save)
        return outputs._replace(updates=torch.ones_like(outputs.updates))

    def failing(problem, save):
        raise RuntimeError("PassManager::run failed\nin line 3")

    for changed, reason in (
        ({"forward": wrong_output}, "differs from the reference by 1e-02"),
        ({"backward": wrong_gradient}, "differs from the reference by 1e-02"),
        ({"forward": wrong_decisions}, "differs from the reference by inf"),
        ({"forward": failing}, "RuntimeError: PassManager::run failed"),
    ):
        with monkeypatch.context() as patch:
            with_kernels(patch, **changed)
            for tested in FEW:
                found = trial.check("batched", "cpu", tested)
                assert (contact.reason(found) or "").endswith(reason)


def test_what_an_engine_does_not_serve_is_no_failure(monkeypatch, capsys):
    """Of two layers with a gate in common; of other stacks the layers run one by one."""
    monkeypatch.setattr(engines.cuda, "unsupported", lambda cells, policy, x: engines.cuda.unfit(cells, policy))
    monkeypatch.setattr(trial, "error", lambda *_: 1e-3)
    found = {tested: trial.check("cuda", "cpu", tested) for tested in contact.VARIANTS}
    refused = {str(tested) for tested, error in found.items() if error != 1e-3}
    assert refused == {"lstm-skip-2", "gru-skip-2", "lstm-selective-2", "gru-selective-2"}
    monkeypatch.setattr(contact, "verdict", lambda *_: found)
    monkeypatch.setattr(trial, "milliseconds", lambda *_: 0.0)
    __main__.table("cpu")
    assert "16/16" in capsys.readouterr().out


def test_a_verdict_is_kept_for_what_it_is_of(fresh, monkeypatch):
    checks = []

    def checked(engine, device, seconds, tested):
        checks.append(tested)
        return {FEW[0]: 1e-6, FEW[1]: contact.LATE}.get(tested, "it fails")

    monkeypatch.setattr(contact, "_checked", checked)
    for _ in range(2):
        assert contact.refused("batched", "cpu", "lstm", "skip", 3) is None
        assert contact.refused("batched", "cpu", "lstm", "always", 1) == "it fails"
        assert contact.refused("batched", "cpu", "gru", "selective", 1) == contact.LATE
        contact.refused.cache_clear()  # as in another process
    late = FEW[1]
    assert checks == [FEW[0], contact.Variant("lstm", "always", 1), late, late]
    (kept,) = fresh.glob("contact-*.json")
    assert json.loads(kept.read_text())["place"] == contact.place("cpu")
    monkeypatch.setattr(torch, "__version__", "another")
    contact.refused("batched", "cpu", "lstm", "skip", 1)
    assert len(checks) == 5


def test_a_process_of_its_own_finds_the_error():
    assert 0 < contact._checked("batched", "cpu", 300, FEW[0]) < 1e-5


def test_a_process_that_comes_down_counts_as_a_failure(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho CUDA error: an illegal memory access >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(contact.sys, "executable", str(program))
    found = contact._checked("batched", "cpu", 300, FEW[0])
    assert found == "its process ended with status -9: CUDA error: an illegal memory access"
    assert contact.reason(found) == found


def test_auto_takes_what_is_right_on_a_gpu(monkeypatch):
    """On one that is not there."""
    wrong: set[str] = set()
    monkeypatch.setattr(contact, "refused", lambda engine, *_: "it differs" if engine in wrong else None)
    for engine in (engines.cuda, engines.triton):
        monkeypatch.setattr(engine, "unsupported", lambda *_: None)
    engines._say_once.cache_clear()
    rnn = Recurrent("lstm", "skip", 8, 110)
    with FakeTensorMode():
        x = torch.empty(32, 25, 8, device="cuda")
    for engine in ("cuda", "triton"):
        assert engines.choose("auto", rnn.cells, rnn.policy, x) == engine
        wrong.add(engine)
    with pytest.warns(UserWarning, match="triton engine is not used on cuda for lstm and skip: it differs"):
        assert engines.choose("auto", rnn.cells, rnn.policy, x) == "batched"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has said so
        assert engines.choose("auto", rnn.cells, rnn.policy, x) == "batched"
    wrong.add("batched")
    with pytest.warns(UserWarning, match="batched engine"):
        assert engines.choose("auto", rnn.cells, rnn.policy, x) == "reference"

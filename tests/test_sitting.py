"""A sitting, rehearsed on the CPU without Hydra, OmegaConf or wandb: check, time, train, stop, bring back, go on."""

import json
import os
import signal
import sys
import tarfile
from dataclasses import replace

import pytest
from conftest import command
from test_runs import assert_same_outcome

from skiprnn import sitting
from skiprnn.model.engines import contact
from skiprnn.training import job
from skiprnn.training.folder import RunFolder
from skiprnn.training.module import SideBySide, architecture

GRID = [
    *("data=digits", "profile=digits/smoke", "model=lstm,skip_lstm,random_skip_gru", "seed=0,1"),
    *("model.hidden_size=6", "training.epochs=3", "training.batch_size=256"),
]
BLOCKED = ("hydra", "omegaconf", "wandb")


@pytest.fixture
def bare(tmp_path):
    """The environment of a machine that has what a sitting needs, and nothing of BLOCKED."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in BLOCKED:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    path = os.pathsep.join([str(folder), *(part for part in sys.path if part)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SKIPRNN_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def planned(tmp_path):
    folder = tmp_path / "planned"
    sitting.main(["plan", str(folder), *GRID])
    return folder


def test_a_sitting_goes_on_where_the_first_was_stopped(planned, bare, tmp_path, monkeypatch):
    for name, value in bare.items():
        monkeypatch.setenv(name, value)
    first, second = tmp_path / "first", tmp_path / "second"
    one = sitting.Sitting(planned, device="cpu")
    one.choose(lambda: 1e9)
    one.shorten(1e9, lambda: 1e9)
    known = json.loads((planned / "sitting.json").read_text())
    assert [list(times) for times in known["seconds"].values()] == [["batched"]] * 3, "timed for each model"
    assert known["torch"].keys() == {"lstm"}
    step, calls = SideBySide.training_step, iter(range(99))

    def ending_step(self, *arguments):
        if next(calls) == 7:  # a batch of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SideBySide, "training_step", ending_step)
        with pytest.raises(SystemExit, match=job.INTERRUPTED):
            sitting.main(["run", str(planned), "--device", "cpu"])
    one.archive(first)
    assert one.told() == "0 of 6 runs complete, 1 of 3 epochs done"
    unpacked = tmp_path / "unpacked"
    for archive in first.iterdir():
        with tarfile.open(archive) as content:
            content.extractall(unpacked, filter="data")
    line = ["train", str(unpacked), "--device", "cpu", "--archive", str(second)]
    done = command(*line, module="skiprnn.sitting", env=bare)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 runs complete, 3 of 3 epochs done" in done.stdout
    assert json.loads((unpacked / "sitting.json").read_text()) == known, "nothing is measured twice"
    assert {file.stem for file in second.iterdir()} == {"sitting", "lstm", "skip_lstm_lambda0", "random_skip_gru_p0.5"}
    went_on = sitting.Sitting(unpacked, device="cpu").chosen()
    undisturbed = [replace(run, output=str(tmp_path / "undisturbed")) for run in went_on]
    job.train(undisturbed)
    for one_run, other in zip(went_on, undisturbed, strict=True):
        assert_same_outcome(RunFolder(one_run), RunFolder(other))


def test_the_fastest_engine_is_taken_for_each_model(planned, monkeypatch):
    """Of those that were timed; and they are timed again on another machine."""
    times = {"triton": {"lstm": 0.3}, "batched": {"lstm": 0.2, "skip_lstm": 0.5}}
    asked = []

    def child(self, command, option, engine, seconds):
        asked.append(engine)
        rows = {run.model.name: architecture(run) for run in self.runs}
        return 0, [{"row": rows[name], "seconds": taken} for name, taken in times[engine].items()]

    monkeypatch.setattr(sitting.Sitting, "child", child)
    monkeypatch.setattr(sitting, "candidates", lambda device: list(times))
    monkeypatch.setattr(contact, "verdict", lambda *_: {})
    for _ in range(2):
        one = sitting.Sitting(planned, device="cpu")
        one.choose(lambda: 1e9)
        taken = {run.model.name: run.engine for run in one.chosen()}
        assert taken == {"lstm": "batched", "skip_lstm": "batched", "random_skip_gru": "auto"}
    assert asked == ["triton", "batched"]
    monkeypatch.setattr(contact, "place", lambda device: {"device": "another"})
    times["triton"]["lstm"] = 0.1
    one.choose(lambda: 1e9)
    assert {run.model.name: run.engine for run in one.chosen()}["lstm"] == "triton"


def test_what_is_planned_takes_no_longer_than_the_budget(planned, monkeypatch):
    """All runs are shortened alike, once."""
    one = sitting.Sitting(planned, device="cpu")
    monkeypatch.setattr(sitting.Sitting, "child", lambda *_, **__: (0, [{"row": "all", "seconds": 6.0}]))
    one.shorten(1.0, lambda: 1e9)  # 5 batches of training, 2 of validation: 34 seconds an epoch
    assert {run.training.epochs for run in one.chosen()} == {1}
    one.shorten(1e9, lambda: 1e9)
    assert {run.training.epochs for run in sitting.Sitting(planned, device="cpu").chosen()} == {1}


def test_without_a_plan_it_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match=r"no plan there; make one: python -m skiprnn\.sitting plan"):
        sitting.main(["train", str(tmp_path)])

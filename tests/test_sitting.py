"""A sitting, rehearsed on the CPU without Hydra, OmegaConf or wandb: check, time, train, stop, bring back, go on."""

import json
import os
import signal
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import replace

import pytest
from conftest import command, make_small_imdb
from test_runs import assert_same_outcome

from skiprnn import sitting
from skiprnn.model.engines import contact
from skiprnn.training import estimate, job, setup
from skiprnn.training.config import ConfigError
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


@pytest.fixture
def engines(monkeypatch):
    """A function: what the checks of some engines find, which must be underway together."""

    def be(found):
        together = threading.Barrier(len(found))

        def verdict(engine, device, variants, seconds):
            if seconds:
                together.wait(20)
            return dict.fromkeys(variants, found[engine])

        monkeypatch.setattr(contact, "verdict", verdict)
        monkeypatch.setattr(sitting, "candidates", lambda device: list(found))

    return be


def test_the_fastest_engine_is_taken_for_each_model(planned, monkeypatch, engines):
    """Of those that are right and were timed; and they are timed again on another machine."""
    times = {"triton": {"lstm": 0.3}, "batched": {"lstm": 0.2, "skip_lstm": 0.5}}
    asked = []

    def child(self, name, option, *timed, seconds):
        asked.append(timed)
        rows = {run.model.name: architecture(run) for run in self.runs}
        lines = [(engine, rows[name], taken) for engine in timed for name, taken in times[engine].items()]
        return 0, [{"engine": engine, "row": row, "seconds": taken} for engine, row, taken in lines]

    monkeypatch.setattr(sitting.Sitting, "child", child)
    engines({"cuda": "it fails", "triton": 0.0, "batched": 1e-4})
    for _ in range(2):
        one = sitting.Sitting(planned, device="cpu")
        one.choose(lambda: 1e9)
        taken = {run.model.name: run.engine for run in one.chosen()}
        assert taken == {"lstm": "batched", "skip_lstm": "batched", "random_skip_gru": "auto"}
    assert asked == [("triton", "batched")]
    monkeypatch.setattr(contact, "place", lambda device: {"device": "another"})
    times["triton"]["lstm"] = 0.1
    one.choose(lambda: 1e9)
    assert {run.model.name: run.engine for run in one.chosen()}["lstm"] == "triton"


def test_an_engine_that_brings_the_timing_down_is_left_out(planned, monkeypatch, engines):
    asked = []

    def child(self, name, option, *timed, seconds):
        asked.append(timed)
        right = {"engine": "batched", "row": architecture(self.runs[0]), "seconds": 0.2}
        return (-9, [{"engine": "batched"}, right, {"engine": "triton"}]) if "triton" in timed else (0, [right])

    monkeypatch.setattr(sitting.Sitting, "child", child)
    engines({"triton": 0.0, "batched": 0.0})
    one = sitting.Sitting(planned, device="cpu")
    one.choose(lambda: 1e9)
    assert asked == [("triton", "batched"), ("batched",)]
    assert one.chosen()[0].engine == "batched"


def test_an_engine_twice_as_slow_is_timed_for_the_first_model_alone(planned, monkeypatch, engines, capsys):
    times = {"triton": 0.1, "batched": 0.19, "cuda": 0.21}
    monkeypatch.setattr(setup, "make_module", lambda run: run)
    monkeypatch.setattr(sitting, "seconds_per_step", lambda runs, stage, steps: times[runs[0].engine])
    monkeypatch.setattr(sitting, "measure_torch", lambda run: 0.3)
    engines(dict.fromkeys(times, 0.0))
    sitting.timed(sitting.Sitting(planned, device="cpu"), list(times))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(line["engine"] for line in lines if "row" in line) == {"triton": 3, "batched": 3, "cuda": 1}
    assert [line["seconds"] for line in lines if "torch" in line] == [0.3]


@pytest.mark.parametrize("place", ["plan", "sitting"])
def test_a_named_engine_is_checked_and_taken(planned, monkeypatch, engines, place):
    monkeypatch.setattr(sitting.Sitting, "child", lambda *_, **__: pytest.fail("nothing is to be timed"))
    if place == "plan":
        sitting.main(["plan", str(planned), *GRID, "--engine", "batched"])
    else:
        sitting.Sitting(planned, device="cpu", engine="batched")
    one = sitting.Sitting(planned, device="cpu")  # as in its processes, and later
    engines({"batched": 1e-4})
    one.choose(lambda: 1e9)
    assert {run.engine for run in one.chosen()} == {"batched"}
    engines({"batched": 0.5})
    with pytest.raises(ConfigError, match=r"--engine batched for .*differs from the reference by 5e-01; --engine auto"):
        one.choose(lambda: 1e9)
    assert sitting.Sitting(planned, device="cpu", engine="auto").chosen()[0].engine == "auto"
    with pytest.raises(SystemExit, match="engine=fast: there are auto"):
        sitting.main(["train", str(planned), "--device", "cpu", "--engine", "fast"])
    assert sitting.Sitting(planned, device="cpu").runs[0].engine == "auto", "nothing is kept of it"


@pytest.mark.parametrize("obeys", [True, False])
def test_a_process_is_told_to_end_and_then_ended_with_what_it_started(planned, tmp_path, monkeypatch, obeys):
    """Time passes when the process has come to where it waits; one that it started holds the pipe."""
    set_to = {}
    for signal_ in ("SIGTERM", "SIGKILL"):
        os.mkfifo(tmp_path / signal_)
    program = tmp_path / "program"
    program.write_text(f"""#!{sys.executable}
import os, signal, sys

def told(*_):
    print('{{"told": 1}}', flush=True)
    if {obeys}:
        os._exit(3)
    open("{tmp_path}/SIGKILL", "w").close()

def late(*_):
    print('{{"late": 1}}', flush=True)
    os._exit(4)

signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGALRM, late)
print('{{"row": "lstm"}}', "words", sep="\\n", flush=True)
started = 0 if {obeys} else os.fork()
signal.alarm(20)
if {obeys} or started:
    open("{tmp_path}/SIGTERM", "w").close()
while True:
    signal.pause()
""")
    program.chmod(0o755)

    class Timer(threading.Thread):
        def __init__(self, seconds, function, arguments):
            name = "SIGTERM" if signal.SIGTERM in arguments else "SIGKILL"
            set_to[name] = seconds

            def wait():
                (tmp_path / name).read_bytes()  # till it was opened and closed
                function(*arguments)

            super().__init__(target=wait, daemon=True)

        def cancel(self):
            pass

    monkeypatch.setattr(sitting.threading, "Timer", Timer)
    monkeypatch.setattr(sitting.sys, "executable", str(program))
    status, lines = sitting.Sitting(planned, device="cpu").child("run", seconds=7.0)
    assert (status, lines) == (3 if obeys else -signal.SIGKILL, [{"row": "lstm"}, {"told": 1}])
    assert set_to == {"SIGTERM": 7.0, "SIGKILL": 7.0 + sitting.RESERVE / 2}


def test_a_sitting_ends_within_its_minutes(planned, tmp_path, monkeypatch):
    """What its imports took counts, and half of the reserve is left when the last process is gone."""
    now, given = {"monotonic": 1000.0}, []
    monkeypatch.setattr(sitting.time, "process_time", lambda: 12.0)
    monkeypatch.setattr(sitting.time, "monotonic", lambda: now["monotonic"])

    def choose(self, left):
        now["monotonic"] += 60.0

    def child(self, name, seconds):
        given.append(seconds)
        now["monotonic"] += seconds + sitting.RESERVE / 2  # killed
        return -9, []

    monkeypatch.setattr(sitting.Sitting, "choose", choose)
    monkeypatch.setattr(sitting.Sitting, "child", child)
    one = sitting.Sitting(planned, device="cpu")
    sitting.train(one, 9.5, None, tmp_path / "out")
    assert given == [60 * 9.5 - sitting.RESERVE - 60.0 - 12.0]
    assert now["monotonic"] + 12.0 - 1000.0 == 60 * 9.5 - sitting.RESERVE / 2
    assert (tmp_path / "out" / "sitting.tar").exists()


def test_what_is_planned_takes_no_longer_than_the_budget(planned, monkeypatch):
    """All runs are shortened alike, once."""
    one = sitting.Sitting(planned, device="cpu")
    step = {"train": 6.0, "validation": 2.0}
    monkeypatch.setattr(estimate, "seconds_per_step", lambda runs, stage, steps: step[stage])
    seconds = estimate.seconds_per_epoch(*one.chosen())
    assert seconds == 5 * 6 + 2 * 2, "batches of 1,197 and 300 sequences"
    shorter = [replace(run, training=replace(run.training, train_batches=3)) for run in one.chosen()]
    assert estimate.seconds_per_epoch(*shorter) == 3 * 6 + 2 * 2
    monkeypatch.setattr(sitting.Sitting, "child", lambda *_, **__: (0, [{"row": "all", "seconds": seconds}]))
    one.shorten(1.0, lambda: 1e9)
    assert {run.training.epochs for run in one.chosen()} == {1}
    one.shorten(1e9, lambda: 1e9)
    assert {run.training.epochs for run in sitting.Sitting(planned, device="cpu").chosen()} == {1}


def test_torch_is_timed_on_text_too(small_run, tmp_path):
    make_small_imdb(tmp_path, lambda part, label, number: f"{part} {label} {number}")
    text = ["data=imdb", "profile=imdb/smoke", "+data.reviews_per_class=10", f"data_root={tmp_path}"]
    assert sitting.measure_torch(small_run("model=lstm", *text)) > 0


def test_without_a_plan_it_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match=r"no plan there; make one: python -m skiprnn\.sitting plan"):
        sitting.main(["train", str(tmp_path)])

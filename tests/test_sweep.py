"""Sweeps: names without collisions, complete runs skipped after a kill, failures reported at the end."""

import json
import signal
from subprocess import CompletedProcess

import pytest
from conftest import SMALL, command

from skiprnn import experiments, sweep

SWEEP = ["-m", "model=skip_lstm", "model.cost_per_sample=0,1e-5,1e-4,1e-3", "seed=0,1", *SMALL, "training.epochs=1"]

# A sweep whose process is killed when it begins the n-th run.
KILLED_SWEEP = """
import os, signal, sys
from skiprnn import train

count = int(sys.argv.pop(1))
make_trainer = train.make_trainer
def killed(*arguments):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_trainer(*arguments)
train.make_trainer = killed
train.main()
"""


def test_killed_sweep_continues_with_what_is_incomplete(tmp_path):
    killed = command("4", *SWEEP, f"output={tmp_path}", script=KILLED_SWEEP)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = {path: path.read_bytes() for path in tmp_path.rglob("record.json")}
    assert len(done) == 3
    again = command(*SWEEP, f"output={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert "5 of 8 runs to do" in again.stdout
    records = {path: json.loads(path.read_text()) for path in tmp_path.rglob("record.json")}
    assert len(records) == 8
    assert all(path.read_bytes() == content for path, content in done.items()), "a complete run was repeated"
    settings = {(r["config"]["model"]["cost_per_sample"], r["config"]["seed"]) for r in records.values()}
    assert settings == {(cost, seed) for cost in (0.0, 1e-5, 1e-4, 1e-3) for seed in (0, 1)}
    folders = {path.parent.parent.name for path in records}
    assert folders == {f"skip_lstm_lambda{cost}" for cost in ("0", "1e-05", "0.0001", "0.001")}


def test_failed_run_is_reported_at_the_end_and_the_others_finish(tmp_path):
    rates = "training.learning_rate=1e30,1e-3"
    done = command("-m", rates, *SMALL, "training.epochs=1", f"output={tmp_path}")
    assert done.returncode == 1
    assert "error: 1 of 2 runs failed:" in done.stderr
    assert "lower training.learning_rate" in done.stderr
    assert len(list(tmp_path.rglob("record.json"))) == 1
    assert len(list(tmp_path.rglob("failed.json"))) == 1


def test_experiment_in_two_processes_ends_in_its_table(tmp_path):
    arguments = ["-m", "experiment=digits", "profile=digits/smoke", "training.epochs=1", "model.hidden_size=4"]
    launcher = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2", "threads=1", "device=cpu"]
    done = command(*arguments, *launcher, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "tables" / "digits_smoke" / "table.md").read_text()
    assert table.count("| 1 / 1") == 8
    assert table in done.stdout


def test_experiment_needs_multirun(tmp_path):
    done = command("experiment=digits", f"output={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: experiment=digits is many runs: add -m"


def test_run_asked_for_twice(tmp_path):
    done = command("-m", "seed=0,0", f"output={tmp_path}")
    assert done.returncode == 1
    assert "asks for the same run twice" in done.stderr


ALL = [experiment for experiment in experiments.published() if experiment.name in ("adding", "frequency", "ucf101")]


@pytest.mark.parametrize(("failing", "status"), [("adding", 1), (None, 0)])
def test_all_tables_are_tried_and_what_is_missing_is_told(failing, status, tmp_path, monkeypatch, capsys):
    started = []

    def run(arguments, check):
        started.append(arguments[4:])
        return CompletedProcess(arguments, int(f"experiment={failing}" in arguments))

    monkeypatch.setattr(sweep.experiments, "published", lambda: ALL)
    monkeypatch.setattr(sweep.subprocess, "run", run)
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["smoke", "rows=[1]", f"data_root={tmp_path}", "hydra/launcher=processes"])
    assert stopped.value.code == status
    assert [arguments[:3] for arguments in started] == [
        [f"experiment={name}", f"data={name}", f"profile={name}/smoke"] for name in ("adding", "frequency")
    ]
    assert all(arguments[3:] == started[0][3:] for arguments in started)
    summary = capsys.readouterr().out.split("\n\n")[-1]
    assert summary.startswith("2 of the papers' 3 tables were run\nucf101 was left out: no feature store in ")
    assert ("adding failed" in summary) == (failing == "adding")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: which profile"),
        (["rows=[1]"], "error: which profile"),
        (["weekend"], "error: adding: .*profile/adding/weekend"),
        (["smoke", "rows=[99]"], r"error: adding: rows=\[99\]"),
    ],
)
def test_bad_input_to_all_tables_gets_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sweep.experiments, "published", lambda: ALL)
    with pytest.raises(SystemExit, match=message):
        sweep.main(arguments)

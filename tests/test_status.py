"""What skiprnn.status says of runs: as the queue says, or else the run folders."""

import json

import pytest
from conftest import SMALL, compose, trained

from skiprnn import status
from skiprnn.papers import plan
from skiprnn.training.config import ConfigError

QUEUE = "7_0|RUNNING|None\n7_1|PENDING|Priority\n7_2|CANCELLED|None\n8|REQUEUE_HOLD|JobHeldAdmin\n"


@pytest.fixture
def planned(tmp_path):
    """A sweep of 8 runs into a folder, none of them begun; then `queue` says what squeue says."""
    overrides = ["model=skip_lstm", *SMALL, "training.epochs=2", f"output={tmp_path}"]
    grid = [[*overrides, f"seed={seed}"] for seed in range(8)]
    found = plan.runs(None, grid, compose)
    plan.save_plan(None, "model=skip_lstm seed=range(8)", found)
    return found


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A function: what squeue prints from now on, and its exit status."""
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", str(bin), prepend=":")

    def says(text: str, status: int = 0) -> None:
        (bin / "said").write_text(text)
        (bin / "squeue").write_text(f"#!/bin/sh\ncat {bin / 'said'}{' >&2' if status else ''}\nexit {status}\n")
        (bin / "squeue").chmod(0o755)

    return says


def submit(output, number: int, ids: list[str], jobs: list[list[list[str]]]) -> None:
    """A submission's folder, as it is once its jobs are in the queue."""
    folder = output / "submitit" / str(number)
    folder.mkdir(parents=True)
    (folder / "runs.json").write_text(json.dumps({"cluster": "slurm", "jobs": jobs}))
    for id in ids:
        (folder / f"{id}_submitted.pkl").touch()


def test_status_of_every_kind(planned, queue, tmp_path):
    complete, running, queued, cancelled, held, stopped, failed, begun = planned
    trained(complete.run)
    for one in (running, stopped):
        one.folder.path.mkdir(parents=True)
        for name in ("last.ckpt", "metrics.csv"):
            (one.folder.path / name).write_bytes((complete.folder.path / name).read_bytes())
    for one in (failed, queued):
        one.folder.path.mkdir(parents=True)
        one.folder.fail(ConfigError("no such thing"))
    submit(tmp_path, 1, ["7_0", "7_1", "7_2"], [[[running.run.name]], [[queued.run.name]], [[cancelled.run.name]]])
    submit(tmp_path, 2, ["8"], [[[held.run.name], [complete.run.name]]])
    queue(QUEUE)
    lock = begun.folder.open()
    try:
        title, *lines = status.report(tmp_path).splitlines()
    finally:
        lock.release()
    assert title.endswith(": 1 complete, 2 running, 2 queued, 1 stopped, 1 failed, 1 waiting")
    assert [line.split() for line in lines] == [
        ["running", running.run.name, *["epoch", "2", "of", "2,", "job", "7_0"]],
        ["running", begun.run.name, *["epoch", "0", "of", "2"]],
        ["queued", queued.run.name, *["job", "7_1,", "pending:", "Priority"]],
        ["queued", held.run.name, *["job", "8,", "requeue_hold:", "JobHeldAdmin"]],
        ["stopped", stopped.run.name, *["epoch", "2", "of", "2"]],
        ["failed", failed.run.name, *["ConfigError:", "no", "such", "thing"]],
    ]


def test_a_queue_that_does_not_answer_is_told(planned, queue, tmp_path):
    submit(tmp_path, 1, ["7"], [[[planned[0].run.name]]])
    queue("slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    told, title = status.report(tmp_path).splitlines()
    assert told == "what is queued is not known: slurm_load_jobs error: Unable to contact slurm controller"
    assert title.endswith(": 8 waiting")


def test_many_runs_of_a_kind_are_counted(planned, queue, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "TOLD", 3)
    submit(tmp_path, 1, ["7"], [[[one.run.name for one in planned]]])
    queue("7|PENDING|Resources\n")
    assert [line.split()[:2] for line in status.report(tmp_path).splitlines()[3:]] == [
        ["queued", planned[2].run.name],
        ["queued", "5"],
    ]


@pytest.mark.parametrize("arguments", [["--verbose"], ["outputs", "others"]])
def test_bad_arguments_get_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match=rf"^error: unrecognized arguments: {arguments[-1]}; see --help$"):
        status.main(arguments)
    assert capsys.readouterr() == ("", "")


def test_no_sweeps(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*no sweeps here; give the folder that was output= of one"):
        status.main([str(tmp_path)])

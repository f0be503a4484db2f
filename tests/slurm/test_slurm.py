"""Sweeps on a real SLURM: whatever happens to jobs, to the login process or to the controller, records are the same.

The main path is in the default suite; the rest: pytest -m slow tests/slurm
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL
from daemons import PROGRAMS, Slurm
from test_runs import assert_same_outcome
from test_sweep import interrupted

from skiprnn.status import report
from skiprnn.training.config import RunConfig
from skiprnn.training.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.mem_gb=1"]
HELD = "+hydra.launcher.slurm_additional_parameters.hold=true"
TINY = [one for one in SMALL if one not in ("threads=1", "training.epochs=4")]
LONG = 10**6  # epochs: until it is ended


class Login:
    """A login node's process with a sweep."""

    def __init__(
        self, slurm, output: Path, *arguments: str, root: Path = ROOT, environment: dict[str, str] | None = None
    ):
        self.slurm, self.output = slurm, output
        self.said = output.with_name(f"{output.name}.{len(list(output.parent.iterdir()))}")
        self.environment = slurm.environment | (environment or {})
        command = [sys.executable, "-m", "skiprnn.train", "-m", *LAUNCHER, *TINY, *arguments, f"output={output}"]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, cwd=root, env=self.environment, stdout=said, stderr=said)

    def text(self) -> str:
        return self.said.read_text()

    def says(self, text: str) -> None:
        until(lambda: text in self.text() or self.process.poll() is not None, self.text)
        assert text in self.text(), self.text()

    def ends(self) -> int:
        until(lambda: self.process.poll() is not None, lambda: f"has not ended: {self.text()}")
        return self.process.returncode

    def submitted(self) -> list[str]:
        """The jobs of the submissions into the output folder."""
        return sorted(
            file.name.removesuffix("_submitted.pkl") for file in self.output.glob("submitit/*/*_submitted.pkl")
        )

    def jobs(self) -> dict[str, str]:
        """State of each that the queue knows."""
        lines = self.slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return {id: state for id, state in map(str.split, lines) if id in self.submitted()}

    def release(self) -> None:
        for id in self.jobs():
            self.slurm("scontrol", "release", id)


def until(holds: Callable[[], bool], message: Callable[[], str], seconds: float = 1200) -> None:
    """Wait for what another process will do."""
    for _ in range(int(seconds / 0.2)):
        if holds():
            return
        signal.sigtimedwait([], 0.2)
    raise AssertionError(message())


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A cluster of 8 CPUs and 2 GPUs, as it believes."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing")
    if os.geteuid():
        pytest.skip("starting SLURM's daemons needs root")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: a socket's has 107 characters
    folder.chmod(0o755)  # munged insists
    cluster = Slurm(folder)
    try:
        cluster.start_all()
        yield cluster
    finally:
        cluster.stop_all()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def login(slurm, tmp_path) -> Iterator[Callable[..., Login]]:
    """A function that starts a sweep; what it leaves is ended."""
    started: list[Login] = []

    def start(*arguments: str, **options) -> Login:
        started.append(Login(slurm, tmp_path / "runs", *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
    slurm("scancel", "--user=root", check=False)
    slurm.wait_for("bash", "-c", "squeue --noheader | wc -l", text="0")


def records(output: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(output.rglob("record.json"))]


def test_the_same_command_finds_its_jobs_when_the_login_process_was_killed(slurm, login, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(slurm.config))
    arguments = ["model=skip_lstm", "seed=0,1", "training.epochs=2", "hydra.launcher.cpus_per_task=3", HELD]
    first = login(*arguments)
    first.says("pending (JobHeldUser)")
    first.process.kill()
    first.ends()
    second = login(*arguments)
    second.says("2 runs are in jobs that were submitted before")
    second.says("2 pending (JobHeldUser)")
    assert "2 queued" in report(tmp_path / "runs")
    slurm.stop("slurmctld")
    second.says("waiting for it")
    slurm.start_controller()
    assert len(second.submitted()) == 2
    second.release()
    assert second.ends() == 0, second.text()
    assert "2 complete" in report(tmp_path / "runs")
    done = records(tmp_path / "runs")
    assert [record["threads"] for record in done] == [3, 3], "as many as the job has CPUs"


@pytest.mark.slow
def test_an_interrupted_login_process_leaves_its_jobs(login):
    one = login("model=skip_lstm", "seed=0", "training.epochs=1", HELD)
    one.says("pending (JobHeldUser)")
    one.process.send_signal(signal.SIGINT)
    assert one.ends() == 1
    assert one.text().splitlines()[-2:] == [
        "the jobs go on, and the same command waits for them",
        "interrupted: the same command continues",
    ]
    assert list(one.jobs().values()) == ["PENDING"]


@pytest.mark.slow
def test_what_clusters_ask_for_reaches_sbatch(slurm, login):
    """As docs/sweeps.md has it."""
    asked = {"partition": "main", "account": "lab", "qos": "normal", "constraint": "a100"}
    setup = "+hydra.launcher.slurm_setup=['module load cuda']"
    settings = [f"+hydra.launcher.slurm_{name}={value}" for name, value in asked.items()]
    one = login("--detach", "model=skip_lstm", "seed=0", HELD, "hydra.launcher.timeout_min=60", setup, *settings)
    assert one.ends() == 0, one.text()
    job = slurm("scontrol", "show", "job", *one.submitted()).split()
    assert {"Partition=main", "Account=lab", "Features=a100", "TimeLimit=01:00:00"} <= set(job)
    (script,) = one.output.rglob("*_submission.sh")
    assert {"#SBATCH --qos=normal", "module load cuda"} <= set(script.read_text().splitlines()), "no accounts, no QOS"


@pytest.mark.slow
def test_detached_jobs_run_the_code_that_was_submitted(slurm, login, tmp_path):
    copy = tmp_path / "copy"
    for name in ("skiprnn", "hydra_plugins", "conf", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test"]
        return subprocess.run(
            ["git", "-C", copy, *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "submitted")
    environment = {"PYTHONPATH": str(copy)}
    one = login("--detach", "model=skip_lstm", "seed=0", "training.epochs=1", HELD, root=copy, environment=environment)
    assert one.ends() == 0, one.text()
    assert "1 jobs submitted" in one.text()
    for file in copy.rglob("*.py"):
        file.write_text("raise SystemExit('pulled meanwhile')")
    git("commit", "-a", "-m", "pulled meanwhile")
    one.release()
    until(lambda: bool(records(tmp_path / "runs")), lambda: str(one.jobs()))
    (record,) = records(tmp_path / "runs")
    assert record["git"] == {"commit": git("rev-parse", "HEAD^").strip(), "dirty": False}


def test_cancelled_jobs_are_reported_and_left(slurm, login, tmp_path):
    epochs = f"training.epochs={LONG},{LONG + 1},1"
    one = login("model=skip_lstm", "seed=0", epochs, "hydra.launcher.slurm_array_parallelism=1")
    until(lambda: sorted(one.jobs().values()) == ["PENDING", "PENDING", "RUNNING"], one.text)
    running, pending, last = one.submitted()
    slurm("scancel", pending)
    one.says(f"job {pending} was cancelled")
    assert one.jobs()[running] == "RUNNING", "not only when all others have ended"
    slurm("scancel", running)
    one.says(f"job {running} was cancelled")
    assert one.ends() == 1
    assert "error: 2 of 3 runs failed:" in one.text()
    assert [record["config"]["training"]["epochs"] for record in records(tmp_path / "runs")] == [1]
    assert one.submitted() == [running, pending, last], "nothing was submitted again"


@pytest.mark.slow
def test_what_was_in_a_dead_job_continues_while_others_run(slurm, login, tmp_path):
    killed = interrupted(tmp_path / "signals", "SIGKILL")
    one = login("model=skip_lstm", "seed=0", f"training.epochs=3,{LONG}", environment=killed)
    one.says("died (failed), and its runs continue in another")
    assert "RUNNING" in one.jobs().values()
    until(lambda: bool(records(tmp_path / "runs")), one.text)
    until(lambda: list(one.jobs().values()).count("RUNNING") == 1, lambda: str(one.jobs()))
    slurm("scancel", "--user=root", "--state=RUNNING")
    assert one.ends() == 1
    assert "error: 1 of 2 runs failed:" in one.text()
    assert len(one.submitted()) == 3


@pytest.mark.slow
def test_jobs_that_never_get_further_are_given_up(slurm, login, tmp_path):
    broken = "+hydra.launcher.slurm_setup=['echo no such module >&2', 'exit 3']"
    one = login("model=skip_lstm", "seed=0", "training.epochs=1", broken)
    assert one.ends() == 1
    assert len(one.submitted()) == 3, one.text()
    assert "3 jobs died and brought it no further; the last: " in one.text()
    assert one.text().strip().endswith("_0_log.err: no such module")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("+hydra.launcher.slurm_partition=none", "Invalid partition name specified"),
        pytest.param(
            "hydra.launcher.gpus_per_node=9", "Requested node configuration is not available", marks=pytest.mark.slow
        ),
    ],
)
def test_what_sbatch_refuses_is_told_in_one_line(setting, reason, login, tmp_path):
    one = login("model=skip_lstm", "seed=0,1", setting)
    assert one.ends() == 1
    assert one.text().splitlines()[-1] == f"error: sbatch: error: Batch job submission failed: {reason}"
    assert one.text().count("sbatch:") == 1
    assert not list((tmp_path / "runs" / "submitit").glob("*/runs.json"))


@pytest.mark.slow
def test_a_gpu_that_is_not_seen_is_told_at_once_and_once(slurm, login):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ["model=skip_lstm,skip_gru", "training.epochs=1", "hydra.launcher.gpus_per_node=1", "device=auto"]
    one = login(*arguments, environment=hidden)
    assert one.ends() == 1
    told, summary = one.text().split("error: 2 of 2 runs failed:")
    assert told.count("the job has a GPU and torch") == 1
    assert summary.count("the job has a GPU and torch") == 2
    assert set(one.jobs().values()) == {"FAILED"}


@pytest.mark.slow
def test_a_node_without_a_compiler_is_told_once(login, tmp_path):
    bare = {"CXX": "no-such-compiler", "SKIPRNN_CACHE": str(tmp_path / "cache")}
    one = login("model=skip_lstm", "seed=0,1", "training.epochs=1", environment=bare)
    assert one.ends() == 0, one.text()
    assert one.text().count("skiprnn's native engine is not available") == 1


@pytest.mark.slow
def test_short_runs_share_jobs_and_arrays_overlap(slurm, login, tmp_path):
    shape = ["hydra.launcher.runs_per_job=3", "hydra.sweeper.max_batch_size=1"]
    one = login("model=skip_lstm", "seed=range(5)", "training.epochs=1", HELD, *shape)
    one.says("2 pending (JobHeldUser)")
    assert len({id.split("_")[0] for id in one.submitted()}) == 2
    one.release()
    assert one.ends() == 0, one.text()
    assert len(records(tmp_path / "runs")) == 5
    assert len(one.submitted()) == 2


@pytest.mark.slow
def test_a_run_whose_time_was_up_ends_as_an_undisturbed_one(login, tmp_path):
    arguments = ["model=random_skip_lstm", "training.epochs=3", "threads=1"]
    told = interrupted(tmp_path / "signals", "SIGUSR2")
    one = login(*arguments, "seed=0", environment=told)
    assert one.ends() == 0, one.text()
    assert "Requeued job" in "".join(file.read_text() for file in tmp_path.rglob("*_log.*"))
    assert len(one.submitted()) == len(records(tmp_path / "runs")) == 1
    assert_as_undisturbed(tmp_path, *arguments, "seed=0")


@pytest.mark.slow
def test_a_time_limit_shorter_than_an_epoch(slurm, login, tmp_path):
    """SLURM's own word, which comes within 30 s of a limit that is near."""
    epoch = ["data=adding", "profile=adding/smoke", "data.length=200", "data.batches_per_epoch=3000", "threads=1"]
    arguments = ["model=random_skip_lstm", *epoch, "training.epochs=1", "training.train_batches=null"]
    one = login(*arguments, "seed=0")
    until(lambda: bool(list(one.output.glob("adding/*/*/config.yaml"))), one.text)
    (job,) = one.submitted()
    minutes = int(slurm("squeue", "--noheader", f"--jobs={job}", "--format=%M").split(":")[-2])
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
    until(lambda: "Requeued job" in "".join(file.read_text() for file in one.output.rglob("*_log.*")), one.text)
    assert not list(one.output.rglob("metrics.csv")), "within the first epoch"
    assert list(one.output.rglob("last.ckpt"))
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=240")
    until(lambda: one.process.poll() is not None, one.text, seconds=3600)
    assert one.process.returncode == 0, one.text()
    assert one.submitted() == [job]
    assert_as_undisturbed(tmp_path, *arguments, "seed=0")


@pytest.mark.slow
def test_whatever_happens_to_jobs_their_runs_end_as_undisturbed_ones(slurm, login, tmp_path):
    arguments = ["model=random_skip_lstm", "training.epochs=150", "threads=1"]
    one = login(*arguments, "seed=0,1,2")
    until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 3, one.text)
    requeued, stopped, _ = one.submitted()
    slurm("scontrol", "update", f"NodeName={slurm.host}", "State=DRAIN", "Reason=test")
    slurm("scontrol", "requeue", requeued)
    slurm("scancel", f"{stopped}.0")
    slurm.stop("slurmctld")
    slurm.stop("slurmd")
    slurm.start_controller()
    slurm.start_node()
    until(lambda: one.jobs()[requeued] == "PENDING", lambda: str(one.jobs()))
    slurm("scontrol", "update", f"NodeName={slurm.host}", "State=RESUME")
    assert one.ends() == 0, one.text()
    assert f"job {stopped} died (failed), and its runs continue in another" in one.text()
    assert len(one.submitted()) == 4
    assert len(records(tmp_path / "runs")) == 3
    assert_as_undisturbed(tmp_path, *arguments, "seed=0,1,2")


def assert_as_undisturbed(folder: Path, *arguments: str) -> None:
    """Runs in a folder ended as those of a sweep on this machine to which nothing happened."""
    program = [sys.executable, "-m", "skiprnn.train", "-m"]
    subprocess.run([*program, *TINY, *arguments, f"output={folder / 'undisturbed'}"], cwd=ROOT, check=True)
    for record in records(folder / "runs"):
        runs = [RunConfig.of(record["config"], output=str(folder / name)) for name in ("runs", "undisturbed")]
        assert_same_outcome(*map(RunFolder, runs))

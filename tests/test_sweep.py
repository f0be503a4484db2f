"""Sweeps: names without collisions, complete runs skipped after a kill, failures reported at the end."""

import json
import multiprocessing
import os
import signal
from concurrent.futures import BrokenExecutor
from functools import partial
from subprocess import CompletedProcess

import pytest
from conftest import SMALL, command, compose
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import OmegaConf

from hydra_plugins.skiprnn_submitit import SubmititLauncher
from skiprnn import sweep, train
from skiprnn.papers import experiments
from skiprnn.training import config
from skiprnn.training.config import ConfigError

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


# Python runs this when a process starts: the first ones to write a checkpoint get SIGNALS, one each.
INTERRUPTED = """
import os, pathlib, signal

replace = pathlib.Path.replace
def replace_and_be_interrupted(self, target):
    result = replace(self, target)
    if pathlib.Path(target).name == "last.ckpt":
        for number, name in enumerate(os.environ["SIGNALS"].split()):
            try:
                pathlib.Path(__file__).with_name(f"{number}.sent").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.Signals[name])
            break
    return result
pathlib.Path.replace = replace_and_be_interrupted
"""


def interrupted(folder, *signals: str) -> dict[str, str]:
    """The environment in which processes are interrupted once they have written a checkpoint."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(INTERRUPTED)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "SIGNALS": " ".join(signals)}


def assert_no_epoch_was_repeated(output, runs: int, epochs: int) -> None:
    """Every run is complete, and its metrics are those of one that nobody interrupted."""
    files = sorted(output.rglob("record.json"))
    assert len(files) == runs
    for file in files:
        assert (file.parent / "metrics.csv").read_text().count("\n") == epochs + 1
        assert json.loads(file.read_text())["final"]["epoch"] == epochs - 1


def test_sweep_outlives_killed_workers(tmp_path):
    launcher = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
    arguments = ["-m", "model=skip_lstm", "seed=0,1,2", *SMALL, "training.epochs=3"]
    environment = interrupted(tmp_path / "signals", "SIGKILL")
    done = command(*arguments, *launcher, f"output={tmp_path / 'runs'}", env=environment)
    assert done.returncode == 0, done.stderr
    assert "a process was killed" in done.stdout
    assert (tmp_path / "signals" / "0.sent").exists()
    assert_no_epoch_was_repeated(tmp_path / "runs", runs=3, epochs=3)


@pytest.mark.parametrize(
    "options",
    [["-m", "seed=0,1"], ["-m", "seed=0,1", "hydra/launcher=processes", "hydra.launcher.n_jobs=2"], ["seed=0"]],
    ids=["sweep", "processes", "run"],
)
def test_interrupted_by_its_user(options, tmp_path):
    arguments = [*options, "model=skip_lstm", *SMALL, "training.epochs=3", f"output={tmp_path / 'runs'}"]
    environment = interrupted(tmp_path / "signals", "SIGINT")
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # however the tests were started
    stopped = command(*arguments, env=environment, preexec_fn=listening)
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1] == train.INTERRUPTED, stopped.stderr
    assert command(*arguments).returncode == 0
    assert_no_epoch_was_repeated(tmp_path / "runs", runs=2 if "-m" in options else 1, epochs=3)


def test_submitit_jobs_outlive_time_outs_and_kills(tmp_path):
    """SLURM's launcher on submitit's local executor: one job is told that its time is up, another is killed."""
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus_per_node=0"]
    arguments = ["-m", "model=skip_lstm", "seed=0,1", *SMALL, "training.epochs=3", f"output={tmp_path / 'runs'}"]
    environment = interrupted(tmp_path / "signals", "SIGUSR2", "SIGKILL")
    done = command(*arguments, *launcher, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 jobs submitted" in done.stdout
    assert "a process was killed" in done.stdout
    logs = "".join(file.read_text() for file in tmp_path.rglob("*_log.*"))
    assert "Requeued job" in logs
    assert_no_epoch_was_repeated(tmp_path / "runs", runs=2, epochs=3)


COST = "model.cost_per_sample"


def planned_runs(*overrides: str) -> list[experiments.PlannedRun]:
    return experiments.plan(None, [list(overrides)], compose)


def test_sweep_gives_up_when_no_run_gets_further(tmp_path):
    todo = planned_runs(f"output={tmp_path}")
    launches = []

    def launch(jobs):
        launches.append(jobs)
        raise BrokenExecutor("a worker died\nsomewhere")

    assert sweep.launch_all(todo, launch) == [f"  {todo[0].run.name}: a worker died"]
    assert len(launches) == sweep.ATTEMPTS


def test_sweep_starts_again_with_what_is_left(tmp_path):
    todo = [one for seed in range(5) for one in planned_runs(f"seed={seed}", f"output={tmp_path}")]
    launches = []

    def launch(jobs):
        launches.append(len(jobs))
        if len(jobs) == 1:
            return [JobReturn(status=JobStatus.COMPLETED)]
        (one,) = [one for one in todo if sweep.overrides([one]) == jobs[0]]
        one.folder.path.mkdir(parents=True)
        one.folder.finish({})
        raise BrokenExecutor("a worker died")

    assert sweep.launch_all(todo, launch) == []
    assert launches == [5, 4, 3, 2, 1]


OVERRIDES = [
    "model=skip_gru model.cost_per_sample=1",
    "data=mnist profile=mnist/cpu training.epochs=1",  # below the profile's cost_free_epochs
    "data=mnist profile=mnist/cpu training.epochs=1 training.cost_free_epochs=0",
    "data=adding data.length=7 seed=3",
    "model=random_skip_gru model.p_skip=0.2 model.learn_initial_state=false",
    "model=random_skip_gru model.p_skip=null",
    "model=lstm model.cost_per_sample=1e-4",  # λ is not among lstm's settings
    "model.hidden_size=many",
    "model.width=3",
    "training.epochs=2.5",
    "seed=one",
    "logger=[csv,wandb] logger.wandb.project=other",
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_plan_reads_overrides_as_hydra_does(overrides):
    """It composes as seldom as it can; the run, or the error, is the same."""

    def outcome(read):
        try:
            return read(overrides.split())
        except (ConfigError, HydraException) as error:
            return type(error), str(error)

    assert outcome(experiments._Reader(compose)) == outcome(lambda given: config.read(compose(given)))


def test_plan_composes_once_per_choice_of_groups(tmp_path):
    composed = []

    def count(overrides):
        composed.append(overrides)
        return compose(overrides)

    costs, seeds = [f"model.cost_per_sample={n}e-6" for n in range(50)], [f"seed={n}" for n in range(4)]
    models = ["model=skip_lstm", "model=skip_gru"]
    grid = [[model, cost, seed] for model in models for cost in costs for seed in seeds]
    planned = experiments.plan(None, grid, count)
    assert len({one.run.name for one in planned}) == 400
    assert len(composed) <= 1 + len(models)


def test_plan_is_kept_for_who_watches(tmp_path):
    planned = [one for seed in (0, 3) for one in planned_runs(f"seed={seed}", f"output={tmp_path}")]
    for _ in range(2):
        experiments.save_plan(None, "seed=0,3 threads=1", planned)
    (saved,) = experiments.saved_plans(tmp_path)
    assert (saved.experiment.title, saved.command) == ("seed=0,3", "seed=0,3 threads=1")
    assert [one.folder.path for one in saved.planned] == [one.folder.path for one in planned]
    assert [one.row.label for one in saved.planned] == [one.row.label for one in planned]


def slurm_launcher(*overrides: str) -> SubmititLauncher:
    with_hydra = compose(["hydra/launcher=slurm", "output=runs", *overrides], return_hydra_config=True)
    settings = OmegaConf.to_container(with_hydra.hydra.launcher, resolve=True)
    assert settings.pop("_target_").endswith("SubmititLauncher")
    return SubmititLauncher(**settings)


def test_slurm_jobs_have_a_gpu_each_and_are_requeued(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = slurm_launcher("hydra.launcher.timeout_min=30", "+hydra.launcher.slurm_partition=long").executor()
    script = executor._executor._make_submission_file_text("command", "id")
    flags = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"gpus-per-node=1", "requeue", "signal=USR2@120", "time=30", "partition=long", "open-mode=append"} <= flags


def test_slurm_launcher_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no srun; start the sweep on a login node"):
        slurm_launcher().executor()


def test_unknown_setting_of_submitit():
    launcher = slurm_launcher("hydra.launcher.cluster=local", "+hydra.launcher.slurm_gpu=1")
    with pytest.raises(ConfigError, match=r"hydra.launcher: .*gpu"):
        launcher.executor()


def test_processes_take_turns_over_the_gpus(monkeypatch):
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 2)
    (planned,) = planned_runs("device=auto")
    devices = []
    for name in ("MainProcess", "LokyProcess-1", "LokyProcess-2", "LokyProcess-3"):
        monkeypatch.setattr(multiprocessing.current_process(), "name", name)
        devices.append(str(train.device_of(planned.run)))
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_seeds_of_a_row_share_a_job_where_there_is_a_gpu():
    todo = [one for seed in (0, 1) for cost in ("0", "1e-3") for one in planned_runs(f"seed={seed}", f"{COST}={cost}")]
    pages = planned_runs("logger=[csv,wandb]", "seed=0") + planned_runs("logger=[csv,wandb]", "seed=1")
    assert [len(pack) for pack in sweep.packed(todo, gpu=True)] == [2, 2]
    assert [len(pack) for pack in sweep.packed(todo, gpu=False)] == [1, 1, 1, 1]
    assert [len(pack) for pack in sweep.packed(pages, gpu=True)] == [1, 1], "a process has one page"

"""Sweeps: names without collisions, complete runs skipped after a kill, failures reported at the end."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from itertools import chain, repeat
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import hydra
import pytest
import torch
from conftest import SMALL, command, compose
from hydra.errors import HydraException
from rich.console import Console
from test_runs import assert_same_outcome

from skiprnn import sweep, tables, train
from skiprnn.papers import experiments, plan
from skiprnn.papers import sweep as one_sweep
from skiprnn.training import command_line, config, estimate, job, setup, workers
from skiprnn.training.cluster import place, submissions
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder
from skiprnn.training.module import SideBySide

SWEEP = ["-m", "model=skip_lstm", "model.cost_per_sample=0,1e-5,1e-4,1e-3", "seed=0,1", *SMALL, "training.epochs=1"]

# A sweep whose process is killed when it begins the n-th run.
KILLED_SWEEP = """
import os, signal, sys
from skiprnn import train
from skiprnn.training import job

count = int(sys.argv.pop(1))
make_trainer = job.make_trainer
def killed(*arguments):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_trainer(*arguments)
job.make_trainer = killed
train.main()
"""


def test_killed_sweep_continues_with_what_is_incomplete(tmp_path, capsys):
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
    (table,) = tmp_path.glob("tables/digits-*_cpu/table.md")
    text = table.read_text()
    assert text.count("| 2 / 2") == 4
    assert text in again.stdout, "any sweep ends with its table"
    assert (table.parent / "figures" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert f"figures in {table.parent}/figures/\n  tradeoff.pdf\n  tradeoff.png" in again.stdout
    assert again.stdout.splitlines()[-1].startswith(f"Next: python -m skiprnn.dashboard {tmp_path}")
    tables.main([*SWEEP[1:], f"output={tmp_path}", "hydra/launcher=processes"])
    assert text in capsys.readouterr().out, "the same overrides, the same table"
    assert "srun" not in again.stderr
    assert "deprecated" not in again.stderr


def test_failed_run_is_reported_at_the_end_and_the_others_finish(tmp_path):
    rates = ["-m", "training.learning_rate=1e30,1e-3", *SMALL, "training.epochs=1", f"output={tmp_path}"]
    for todo in (2, 0):  # a run that diverged is done, and not forgotten
        done = command(*rates)
        assert done.returncode == 1
        assert f"{todo} of 2 runs to do" in done.stdout
        assert "error: 1 of 2 runs failed:" in done.stderr
        assert "lower training.learning_rate" in done.stderr
        assert "failed.json to try again" in done.stderr
        assert len(list(tmp_path.rglob("record.json"))) == 1
        assert len(list(tmp_path.rglob("failed.json"))) == 1


def test_experiment_in_two_processes_ends_in_its_table(tmp_path):
    arguments = ["-m", "experiment=digits", "profile=digits/smoke", "training.epochs=1", "model.hidden_size=4"]
    launcher = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2", "threads=1", "device=cpu"]
    done = command(*arguments, *launcher, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "tables" / "digits_smoke" / "table.md").read_text()
    assert table.count("| 1 / 1") == 12
    assert table in done.stdout


def test_each_data_set_has_a_table_with_its_score(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "profile").mkdir(parents=True)
    common = (config.packaged("conf") / "profile" / "digits" / "cpu.yaml").read_text()
    (tmp_path / "conf" / "profile" / "common.yaml").write_text(common)  # of both data sets
    grid = ["data=digits,adding", "profile=common", "model=skip_lstm", "seed=0,1", f"output={tmp_path}"]
    for one in plan.requested(grid)[1]:
        score, task = ("mse", "regression") if one.run.data["name"] == "adding" else ("accuracy", "classification")
        test = {score: 0.25, "state_updates": 30.0, "inference_flops": 1e6}
        results = {"test": test, "validation": test}
        one.folder.path.mkdir(parents=True)
        facts = {"steps": 50, "solved_at": None, "input_flops": 0.0}
        one.folder.finish(facts | {"task": task, "best": results, "final": results})
    tables.main(grid)
    digits, adding = capsys.readouterr().out.split("written to")[:2]
    assert "| Accuracy " in digits
    assert "| MSE " in adding
    assert digits.count("| 2 / 2") == adding.count("| 2 / 2") == 1
    with pytest.raises(SystemExit, match="2 data sets make 2 tables"):
        tables.main([*grid, f"publish={tmp_path / 'published'}"])


@pytest.mark.parametrize("target", [None, 0.25])
def test_other_sweepers_search_by_the_score_or_a_target_of_updates(target, tmp_path, capsys):
    """What Hydra gives Optuna, which is not ours to install."""
    given = [*SMALL, "training.epochs=1", f"output={tmp_path}", *([f"target_updates={target}"] if target else [])]
    value = train.train.__wrapped__(compose(given))
    (file,) = tmp_path.rglob("record.json")
    record = json.loads(file.read_text())
    share = record["final"]["validation"]["state_updates"] / record["steps"]
    assert value == (abs(share - target) if target else record["best"]["validation"]["accuracy"])
    assert str(file.with_name("best.ckpt")) in capsys.readouterr().out.splitlines()[-1], "what to do next"


def test_hydras_own_sweeper_works(tmp_path):
    options = ["hydra/sweeper=basic", "seed=0,1", *SMALL, "training.epochs=1"]
    done = command("-m", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["outputs"], "Hydra's multirun.yaml is left elsewhere"
    assert len(list(tmp_path.rglob("record.json"))) == 2


def test_processes_share_one_display(tmp_path, monkeypatch):
    """A line for each run that a process has, with how far it is; none for those that wait or are over."""
    runs = [one.run for seed in range(4) for one in planned_runs(f"seed={seed}", f"output={tmp_path}")]
    _, begun, ahead, over = (RunFolder(run) for run in runs)
    display = workers.Display([runs[:2], runs[2:]])
    over.path.mkdir(parents=True)
    over.fail(RuntimeError("lost"))
    locks = [folder.open() for folder in (begun, ahead)]
    rows = "epoch,validation/accuracy,validation/state_updates,seconds\n" + "".join(
        f"{n},0.5,20,60\n" for n in range(3)
    )
    ahead.last.touch()
    ahead.metrics_file.write_text(rows)
    console = Console(width=160, record=True, file=StringIO())
    console.print(display)
    for lock in locks:
        lock.release()
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == [begun.run.name, ahead.run.name, "all"]
    epochs = ahead.run.training.epochs
    assert f"0 / {epochs}" in lines[0]
    left = workers.duration((epochs - 3) * 60)
    assert re.search(rf"3 / {epochs} +accuracy 0\.500, updates 20\.0, {left} left", lines[1])
    assert "1 / 4" in lines[2]
    monkeypatch.setattr(job, "on_terminal", lambda: True)
    assert job.has_bar()
    monkeypatch.setattr(multiprocessing.current_process(), "name", "LokyProcess-1")
    assert not job.has_bar(), "the process that started this one draws it"


@pytest.mark.parametrize(("batch_size", "seconds"), [(256, 5 * 10 + 2 * 1), (2048, 10 + 1)])
def test_an_epoch_is_estimated_from_a_few_steps(batch_size, seconds, small_run, monkeypatch):
    """Also where it has no more than one; a first step takes longer, and does not count."""
    clock = {"now": 0.0}
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock["now"])
    for hook, took in (("training_step", 10.0), ("validation_step", 1.0)):
        taken = chain([99.0], repeat(took))
        monkeypatch.setattr(SideBySide, hook, lambda *_, taken=taken: clock.update(now=clock["now"] + next(taken)))
    assert estimate.seconds_per_epoch(small_run(f"training.batch_size={batch_size}")) == seconds


@pytest.mark.parametrize(("alone", "told"), [(1.0, True), (2.0, False)])
def test_processes_are_suggested_where_they_are_faster(alone, told, tmp_path, monkeypatch, capsys):
    todo = [
        one for seed in range(4) for one in planned_runs(f"seed={seed}", f"output={tmp_path}", "training.epochs=30")
    ]
    monkeypatch.setattr(one_sweep, "cpu_count", lambda: 2)
    monkeypatch.setattr(one_sweep, "seconds_per_epoch", lambda run: alone if run.threads == 1 else 99)
    one_sweep.tell_processes(todo, {one_sweep.kind_of(one): 1.0 for one in todo})
    said = capsys.readouterr().out
    assert ("hydra/launcher=processes threads=1, 2 at once, about 60 s: 2.0 times as fast" in said) == told
    assert torch.get_num_threads() == 1


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


# Python runs this when a process starts: the first ones to write a file of that NAME get SIGNALS, one each.
INTERRUPTED = """
import os, pathlib, signal

replace = pathlib.Path.replace
def replace_and_be_interrupted(self, target):
    result = replace(self, target)
    if pathlib.Path(target).name == os.environ["NAME"]:
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


def interrupted(folder, *signals: str, name: str = "last.ckpt") -> dict[str, str]:
    """The environment in which processes are interrupted once they have written a file."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(INTERRUPTED)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "SIGNALS": " ".join(signals), "NAME": name}


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


def processes_of(group: int) -> list[int]:
    """The live ones of a process group."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group, *_ = file.read_text().rsplit(")", 1)[1].split()
            if int(its_group) == group and state != "Z":
                found.append(int(file.parent.name))
    return found


def wait_until(holds, process, seconds: float = 300) -> None:
    """Poll until something holds that another process brings about; fail after so many seconds."""
    for _ in range(int(seconds / 0.1)):
        if holds():
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
        signal.sigtimedwait([], 0.1 if process.poll() is not None else 0)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_sweep(number, tmp_path):
    launcher = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2", *SMALL, "training.epochs=1000000"]
    program = [sys.executable, "-m", "skiprnn.train", "-m", "model=skip_lstm", "seed=0,1", *launcher]
    sweep = subprocess.Popen([*program, f"output={tmp_path}"], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2, sweep)
        assert len(processes_of(sweep.pid)) > 2
        sweep.send_signal(number)
        assert sweep.wait() == -number
        wait_until(lambda: not processes_of(sweep.pid), sweep)
    finally:
        for pid in processes_of(sweep.pid):
            os.kill(pid, signal.SIGKILL)
    for run in (one.run for seed in (0, 1) for one in planned_runs("model=skip_lstm", f"seed={seed}", *launcher[2:])):
        folder = RunFolder(replace(run, output=str(tmp_path)))
        folder.open().release()
        assert folder.checkpoint(folder.last)["epoch"] >= 0


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    """A sweep of 8 runs, killed with all its processes at 20 random moments, ends as an undisturbed one."""
    options = ["model=skip_lstm,random_skip_gru", "seed=range(4)", *SMALL, "training.epochs=60"]
    program = [
        sys.executable,
        "-m",
        "skiprnn.train",
        "-m",
        *options,
        "hydra/launcher=processes",
        "hydra.launcher.n_jobs=2",
    ]
    output = {name: tmp_path / name for name in ("killed", "undisturbed")}
    done = command("-m", *options, f"output={output['undisturbed']}")
    assert done.returncode == 0, done.stderr
    random, kills = Random(0), 0

    def epochs() -> int:
        return sum(file.read_bytes().count(b"\n") - 1 for file in output["killed"].rglob("metrics.csv"))

    while True:
        sweep = subprocess.Popen([*program, f"output={output['killed']}"], start_new_session=True)
        enough = epochs() + random.randint(0, 15)  # of 480
        if kills < 20:
            wait_until(lambda enough=enough: epochs() > enough, sweep, seconds=1200)
            with suppress(subprocess.TimeoutExpired):
                sweep.wait(random.uniform(0, 0.3))
            os.killpg(sweep.pid, signal.SIGKILL)
            kills += 1
        if sweep.wait() != -signal.SIGKILL:
            break
    assert (sweep.returncode, kills) == (0, 20)
    for file in sorted(output["undisturbed"].rglob("record.json")):
        run = RunConfig.of(json.loads(file.read_text())["config"])
        killed, undisturbed = (RunFolder(replace(run, output=str(output[name]))) for name in output)
        assert_same_outcome(killed, undisturbed)
    assert len(list(output["killed"].rglob("record.json"))) == 8
    assert not list(output["killed"].glob("*/*/*/.*.*.*")), "leftovers"


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
    assert stopped.stderr.splitlines()[-1] == job.INTERRUPTED, stopped.stderr
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
    assert "died (gone), and its runs continue in another" in done.stdout
    logs = "".join(file.read_text() for file in tmp_path.rglob("*_log.*"))
    assert "Requeued job" in logs
    assert_no_epoch_was_repeated(tmp_path / "runs", runs=2, epochs=3)


LOCAL = ["hydra/launcher=slurm", "hydra.launcher.cluster=local"]


def test_jobs_whose_time_is_always_up_too_early_are_given_up(tmp_path):
    environment = interrupted(tmp_path / "signals", *["SIGUSR2"] * 3, name="config.yaml")
    done = command("-m", "model=skip_lstm", "seed=0", *SMALL, *LOCAL, f"output={tmp_path / 'runs'}", env=environment)
    assert done.returncode == 1
    assert "was up before it came further" in done.stdout, "said after the first time"
    reason = "3 times its time was up before it came any further: raise hydra.launcher.timeout_min"
    assert reason in done.stderr.splitlines()[-1]


def test_jobs_are_found_again(tmp_path):
    arguments = ["-m", "model=skip_lstm", "seed=0,1", *SMALL, "training.epochs=1000000", *LOCAL, f"output={tmp_path}"]
    program = [sys.executable, "-m", "skiprnn.train", *arguments]
    first = subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL)
    second = None
    try:
        wait_until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2, first)
        first.kill()
        first.wait()
        second = subprocess.Popen(program, start_new_session=True, stdout=subprocess.PIPE, text=True)
        for line in second.stdout:
            if "in jobs" in line:
                break
        assert line == "2 runs are in jobs that were submitted before\n"
    finally:
        for group in [one.pid for one in (first, second) if one]:
            for pid in processes_of(group):
                os.kill(pid, signal.SIGKILL)
        if second:
            second.communicate()


COST = "model.cost_per_sample"


def planned_runs(*overrides: str) -> list[plan.PlannedRun]:
    return plan.runs(None, [list(overrides)], compose)


class DyingWorkers:
    """Stands for joblib.Parallel: its first job's runs end, then a worker dies."""

    def __init__(self, finished: int):
        self.finished, self.launches = finished, []

    def __call__(self, n_jobs, batch_size):
        return self.launch

    def launch(self, calls):
        packs = [arguments[0] for _, arguments, _ in calls]
        self.launches.append(len(packs))
        if len(packs) <= self.finished:
            return [{} for _ in packs]
        for run in packs[0] if self.finished else ():
            RunFolder(run).path.mkdir(parents=True)
            RunFolder(run).finish({})
        raise BrokenExecutor("a worker died\nsomewhere")


def test_sweep_gives_up_when_no_run_gets_further(tmp_path, monkeypatch):
    (one,) = planned_runs(f"output={tmp_path}")
    dying = DyingWorkers(finished=0)
    monkeypatch.setattr(workers, "Parallel", dying)
    assert workers.Here(2).train([[one.run]], None) == {one.run.name: "a worker died"}
    assert len(dying.launches) == workers.ATTEMPTS


def test_sweep_starts_again_with_what_is_left(tmp_path, monkeypatch):
    todo = [one.run for seed in range(5) for one in planned_runs(f"seed={seed}", f"output={tmp_path}")]
    monkeypatch.setattr(RunFolder, "complete", property(lambda folder: folder.record_file.exists()))
    dying = DyingWorkers(finished=1)
    monkeypatch.setattr(workers, "Parallel", dying)
    assert workers.Here(2).train([[run] for run in todo], None) == {}
    assert dying.launches == [5, 4, 3, 2, 1]


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

    assert outcome(plan._Reader(compose)) == outcome(lambda given: command_line.read(compose(given)))


def test_plan_composes_once_per_choice_of_groups(tmp_path):
    composed = []

    def count(overrides):
        composed.append(overrides)
        return compose(overrides)

    costs, seeds = [f"model.cost_per_sample={n}e-6" for n in range(50)], [f"seed={n}" for n in range(4)]
    models = ["model=skip_lstm", "model=skip_gru"]
    grid = [[model, cost, seed] for model in models for cost in costs for seed in seeds]
    planned = plan.runs(None, grid, count)
    assert len({one.run.name for one in planned}) == 400
    assert len(composed) <= 1 + len(models)


def test_plan_is_kept_for_who_watches(tmp_path):
    planned = [one for seed in (0, 3) for one in planned_runs(f"seed={seed}", f"output={tmp_path}")]
    for _ in range(2):
        plan.save_plan(None, "seed=0,3 threads=1", planned)
    (saved,) = plan.saved_plans(tmp_path, pytest.fail)
    assert (saved.experiment.title, saved.command) == ("seed=0,3", "seed=0,3 threads=1")
    assert [one.folder.path for one in saved.planned] == [one.folder.path for one in planned]
    assert [one.row.label for one in saved.planned] == [one.row.label for one in planned]


def slurm(*overrides: str, max_jobs: int | None = None) -> place.Cluster:
    """What hydra/launcher=slurm makes of settings."""
    with_hydra = compose(["hydra/launcher=slurm", "output=runs", *overrides], return_hydra_config=True)
    return hydra.utils.instantiate(with_hydra.hydra.launcher).place(Path("runs"), max_jobs)


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    """Programs of SLURM that do nothing, and nothing else on the path."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_slurm_jobs_have_a_gpu_each_and_are_requeued(no_slurm):
    executor = slurm("hydra.launcher.timeout_min=30", "+hydra.launcher.slurm_partition=long").executor(
        no_slurm, "python"
    )
    script = executor._executor._make_submission_file_text("command", "id")
    flags = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"gpus-per-node=1", "requeue", "signal=USR2@120", "time=30", "partition=long", "open-mode=append"} <= flags
    assert "srun" in script
    assert "--cpus-per-task=2 command" in script, "srun does not know what sbatch was given"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["timeout_min=2"], "timeout_min=2: a job is told 120 s before its time is up, and so at once; raise it"),
        (["timeout_min=1", "slurm_signal_delay_s=90"], "timeout_min=1: a job is told 90 s before"),
        (["runs_per_job=0"], "runs_per_job=0: must be at least 1"),
        (["cluster=sge"], "sge"),
    ],
)
def test_settings_that_cannot_work(settings, message, no_slurm):
    with pytest.raises(ConfigError, match=message):
        slurm(*[f"hydra.launcher.{setting}" for setting in settings])


def test_how_a_job_ended_is_known_after_the_queue_has_forgotten_it(no_slurm):
    one = place.Waiting(submissions.Submitted("7_0", "slurm", no_slurm, [[]]), {}, 0)
    assert [one.is_over(state) for state in ("RUNNING", "CANCELLED", "GONE")] == [False, False, True]
    assert one.state == "CANCELLED"
    assert submissions.last_state(one.job) == "CANCELLED", "it never began"
    (no_slurm / "7_0_0_log.out").touch()
    assert submissions.last_state(one.job) == "GONE"


def test_slurm_launcher_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch; start the sweep on a login node"):
        slurm()


def test_unknown_setting_of_submitit():
    with pytest.raises(ConfigError, match=r"hydra.launcher: .*gpu"):
        slurm("hydra.launcher.cluster=local", "+hydra.launcher.slurm_gpu=1")


def test_processes_take_turns_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (planned,) = planned_runs("device=auto")
    devices = []
    for name in ("MainProcess", "LokyProcess-1", "LokyProcess-2", "LokyProcess-3"):
        monkeypatch.setattr(multiprocessing.current_process(), "name", name)
        devices.append(str(setup.device_of(planned.run)))
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_seeds_of_a_row_share_a_job_where_there_is_a_gpu():
    todo = [one for seed in (0, 1) for cost in ("0", "1e-3") for one in planned_runs(f"seed={seed}", f"{COST}={cost}")]
    pages = planned_runs("logger=[csv,wandb]", "seed=0") + planned_runs("logger=[csv,wandb]", "seed=1")
    todo, pages = [one.run for one in todo], [one.run for one in pages]
    assert [len(pack) for pack in workers.packed(todo, gpu=True)] == [2, 2]
    assert [len(pack) for pack in workers.packed(todo, gpu=False)] == [1, 1, 1, 1]
    assert [len(pack) for pack in workers.packed(pages, gpu=True)] == [1, 1], "a process has one page"


def test_the_other_profiles_of_the_data_are_told_with_their_time(monkeypatch, capsys, tmp_path):
    """A row takes 3 s an epoch here and another 5 s, and each twice that at the paper's batch: 4 runs of 600 epochs."""
    experiment = experiments.load("table1")
    grid = [["experiment=table1", "rows=[1,4]", "profile=mnist/long", f"output={tmp_path}"]]
    first_row = {"paper": 6, "smoke": 1.5, "cpu": 3}
    monkeypatch.setattr(one_sweep, "seconds_per_epoch", lambda run: first_row[run.profile["name"]])
    todo = plan.runs(experiment, grid, compose)
    seconds = {one_sweep.kind_of(one): 3 if one.row.label == "LSTM" else 5 for one in todo}
    one_sweep.tell_other_profiles(experiment, grid, compose, todo, seconds, workers=2)
    told = capsys.readouterr().out
    hours = 4 * 600 * (6 + 10) / 2 / 3600
    assert f"profile=mnist/paper about {hours:.1f} h" in told
    assert "profile=mnist/cpu" in told
    assert "mnist/long" not in told

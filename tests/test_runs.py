"""A killed run ends as one that was never interrupted, bit for bit; a failed one says why."""

import errno
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import SMALL, command, compose, trained

from skiprnn import train
from skiprnn.papers.experiments import Row
from skiprnn.papers.plan import PlannedRun
from skiprnn.training import command_line, job, provenance, setup
from skiprnn.training import folder as runs
from skiprnn.training.config import ConfigError, DivergedError
from skiprnn.training.keeper import MetricsFile, RunKeeper
from skiprnn.training.module import SideBySide
from skiprnn.views import figures

# Runs training in a process that is killed in the middle of writing a file for the n-th time, or in the n-th step.
KILLED_RUN = """
import os, signal, sys
from skiprnn import train
from skiprnn.training import module
from skiprnn.training import folder as runs

what, count = sys.argv.pop(1), int(sys.argv.pop(1))
calls = 0

def killed_here():
    global calls
    calls += 1
    return calls == count

fsync = os.fsync
def half_written(descriptor):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    if name.startswith(f".{what}.") and killed_here():
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = half_written

step = module.SideBySide.training_step
def killed_step(self, *arguments):
    if what == "step" and killed_here():
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
module.SideBySide.training_step = killed_step

train.main()
"""
TIMES = ("seconds", "examples_per_second", "completed")
MODEL = ["model=skip_lstm", "model.cost_per_sample=1e-3", "training.decay_epochs=2"]


def without_times(record: dict, *others: str) -> dict:
    return {key: value for key, value in record.items() if key not in (*TIMES, *others)}


def assert_same_outcome(folder: runs.RunFolder, other: runs.RunFolder, but_for: str = "") -> None:
    """Records but for times, metrics but for times, and every number in both checkpoints are equal."""
    assert without_times(folder.record(), but_for) == without_times(other.record(), but_for)
    tables = [
        pd.read_csv(f.path / "metrics.csv").drop(columns=["seconds", "cpu_seconds", "examples_per_second", "pack"])
        for f in (folder, other)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for name in ("last.ckpt", "best.ckpt"):
        one, two = (torch.load(f.path / name, weights_only=True) for f in (folder, other))
        assert one["epoch"] == two["epoch"]
        for key, value in one["state_dict"].items():
            assert torch.equal(value, two["state_dict"][key]), key
    one, two = (torch.load(f.last, weights_only=True)["optimizer_states"][0]["state"] for f in (folder, other))
    for index, state in one.items():
        for key, value in state.items():
            assert torch.equal(value, two[index][key]), (index, key)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nobody interrupted."""
    output = tmp_path_factory.mktemp("unbroken")
    done = command(*SMALL, *MODEL, f"output={output}")
    assert done.returncode == 0, done.stderr
    (record,) = output.rglob("record.json")
    return output, record.parent


@pytest.mark.parametrize(
    ("what", "count"),
    [("last.ckpt", 1), ("last.ckpt", 3), ("best.ckpt", 1), ("metrics.csv", 2), ("record.json", 1), ("step", 12)],
)
def test_killed_run_continues_to_the_same_end(what, count, unbroken, small_run):
    run = small_run(*MODEL)
    folder = runs.RunFolder(run)
    killed = command(what, str(count), *SMALL, *MODEL, f"output={run.output}", script=KILLED_RUN)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not folder.complete
    trained(run)
    reference = runs.RunFolder(small_run(*MODEL, f"output={unbroken[0]}"))
    assert reference.path == unbroken[1]
    assert_same_outcome(folder, reference)
    assert not list(folder.path.glob(".*.*.*")), "leftovers of the kill"


UNFINISHED = [
    *("model.dropout=0.2", "+training.train_batches=3", "+training.evaluation_batches=1"),
    *("training.cost_free_epochs=1", "training.decay_epochs=2", "training.warmup_epochs=1"),
]


@pytest.mark.parametrize(
    ("folder", "overrides"),
    [
        ("skip_lstm", ["model=skip_lstm", "model.cost_per_sample=1e-3"]),
        ("random_skip_gru", ["model=random_skip_gru", "seed=3"]),
    ],
)
def test_a_run_of_an_earlier_version_continues_to_the_same_end(folder, overrides, small_run):
    """tests/unfinished: what commit 6aa0366 left after two of four epochs, the second run as one of a pack, and the
    record that it had written at the end."""
    left = Path(__file__).with_name("unfinished") / folder
    run = small_run(*UNFINISHED, *overrides)
    own = runs.RunFolder(run)
    own.path.mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt", "metrics.csv"):
        (own.path / name).write_bytes((left / name).read_bytes())
    record, expected = trained(run), json.loads((left / "record_at_the_end.json").read_text())
    for epoch in ("best", "final"):
        assert record[epoch].pop("epoch") == expected[epoch].pop("epoch")
        for stage, results in expected[epoch].items():
            assert record[epoch][stage] == pytest.approx(results, rel=1e-5), (epoch, stage)
    assert pd.read_csv(own.metrics_file)["epoch"].tolist() == [0, 1, 2, 3]
    assert record["commits"][0]["commit"].startswith("6aa0366")


DRAWING = ["model=random_skip_gru", "model.dropout=0.2", "training.epochs=3"]  # of which every step draws


@pytest.fixture
def ending(monkeypatch):
    """A function: (hook, count) -> training is told to end (SIGTERM) in the count-th call of the hook from now on.

    Batches that are trained are counted in `trained`."""

    def end(hook: str, count: int) -> None:
        left = iter(range(count, 0, -1))

        def ending_hook(self, batches, *arguments):
            end.trained += bool(batches) and hook == "training_step"
            if next(left, 0) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return untouched[hook](self, batches, *arguments)

        monkeypatch.setattr(SideBySide, hook, ending_hook)

    untouched = {hook: getattr(SideBySide, hook) for hook in ("training_step", "validation_step")}
    end.trained = 0
    return end


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize(
    ("hook", "count", "batches"),
    [
        ("training_step", 2, 2),
        ("training_step", 8, 3),
        ("training_step", 5, 5),
        ("validation_step", 3, 5),
        ("validation_step", 4, 0),
    ],
)
def test_told_to_end_a_run_goes_on_from_its_last_batch(hook, count, batches, side_by_side, small_run, tmp_path, ending):
    """5 batches are an epoch's training, 2 its validation."""
    told, undisturbed = (
        [small_run(*DRAWING, f"seed={seed}", f"output={tmp_path / name}") for seed in range(side_by_side)]
        for name in ("told", "undisturbed")
    )
    job.train(undisturbed)
    ending(hook, count)
    with pytest.raises(KeyboardInterrupt):
        job.train(told)
    for run in told:
        last = runs.RunFolder(run).checkpoint(runs.RunFolder(run).last)
        assert last.get("within_epoch", {"batches": 0})["batches"] == batches
    ending("training_step", 0)
    before = ending.trained
    job.train(told)
    trained_before = 5 * (last["epoch"] + 1) + batches
    assert ending.trained - before == 15 - trained_before, "no batch is trained twice"
    for one, other in zip(told, undisturbed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def test_runs_that_were_ended_at_different_batches_catch_up(small_run, tmp_path, ending):
    ended, undisturbed = (
        [small_run(*DRAWING, f"seed={seed}", f"output={tmp_path / name}") for seed in range(3)]
        for name in ("ended", "undisturbed")
    )
    job.train(undisturbed)
    for run, count in zip(ended, (7, 9, 10), strict=True):
        ending("training_step", count)
        with pytest.raises(KeyboardInterrupt):
            job.train([run])
    job.train(ended)
    for one, other in zip(ended, undisturbed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other), but_for="places")
        assert [place["pack"] for place in runs.RunFolder(one).record()["places"]][-1] == 3


def test_same_command_gives_the_same_record(unbroken, small_run):
    run = small_run(*MODEL)
    record = trained(run)
    assert without_times(record) == without_times(json.loads((unbroken[1] / "record.json").read_text()))


def test_a_record_names_the_commit_that_the_run_began_with(small_run, tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit_and_validate(self, *arguments):
        git("commit", "--allow-empty", "-m", "while it runs")
        return validate(self, *arguments)

    (tmp_path / "skiprnn").mkdir()
    (tmp_path / "skiprnn" / "__init__.py").touch()
    git("init")
    git("add", "skiprnn")
    git("commit", "-m", "before")
    before = git("rev-parse", "HEAD")
    validate = SideBySide.validation_step
    monkeypatch.setattr(SideBySide, "validation_step", commit_and_validate)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "skiprnn")
    provenance.code_version.cache_clear()
    try:
        record = trained(small_run("training.epochs=1"))
    finally:
        provenance.code_version.cache_clear()
    assert git("rev-parse", "HEAD") != before
    assert record["git"] == {"commit": before, "dirty": False}


def test_a_record_names_every_commit_that_trained_the_run(small_run, monkeypatch):
    versions = [{"commit": "first", "dirty": False}, {"commit": "second", "dirty": True}]
    monkeypatch.setattr(provenance, "code_version", lambda: versions[0])
    run = small_run("training.epochs=3")
    end = RunKeeper.on_train_epoch_end

    def end_and_stop(self, trainer, module):
        end(self, trainer, module)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunKeeper, "on_train_epoch_end", end_and_stop)
    with pytest.raises(KeyboardInterrupt):
        trained(run)
    monkeypatch.setattr(provenance, "code_version", lambda: versions[1])
    with pytest.raises(KeyboardInterrupt):
        trained(run)
    monkeypatch.setattr(RunKeeper, "on_train_epoch_end", end)
    record = trained(run)
    assert record["commits"] == versions
    assert record["git"] == versions[1]


def test_a_record_names_every_place_that_trained_the_run(small_run, monkeypatch):
    run = small_run("training.epochs=3")
    end = RunKeeper.on_train_epoch_end

    def end_and_stop(self, trainer, module):
        end(self, trainer, module)
        if trainer.current_epoch < 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunKeeper, "on_train_epoch_end", end_and_stop)
    engines = ["native", "reference", "reference"]
    for engine in engines[:2]:
        with pytest.raises(KeyboardInterrupt):
            trained(replace(run, engine=engine))
    record = trained(replace(run, engine=engines[2]))
    assert [(place["engine"], place["pack"]) for place in record["places"]] == [("native", 1), ("reference", 1)]
    assert record["engine"] == "reference"


def test_a_place_tells_how_many_runs_shared_the_process(small_run, ending):
    """If only for a part of an epoch: the seconds until then were both's."""
    both = [small_run("training.epochs=2", f"seed={seed}") for seed in (0, 1)]
    ending("training_step", 2)
    with pytest.raises(KeyboardInterrupt):
        job.train(both)
    assert [place["pack"] for place in trained(both[0])["places"]] == [2, 1]
    assert list(pd.read_csv(runs.RunFolder(both[0]).metrics_file)["pack"]) == [2, 2], "of the seconds since the start"


def test_what_lightning_takes_from_a_device_is_brought_back(small_run):
    """Lightning moves what it has trained to the CPU; a record is then made where the data are."""
    module = setup.make_module(small_run())
    module.data.device = torch.device("meta")  # stands for a GPU
    job.fit(SimpleNamespace(fit=lambda runs: runs.to("cpu")), SideBySide([module]))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("tracked", "file", "dirty"),
    [
        ("skiprnn/__init__.py", "skiprnn/new.py", True),
        ("skiprnn/__init__.py", "conf/model/new.yaml", True),
        ("skiprnn/__init__.py", "notes", False),
        ("somebody_elses.py", "notes", None),
    ],
)
def test_untracked_code_and_settings_count_as_changes(tracked, file, dirty, tmp_path, monkeypatch):
    """Where the repository does not track the package, as where it is installed, it says nothing of it."""
    for path in ("skiprnn", "conf/model"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "skiprnn" / "__init__.py").touch()
    (tmp_path / tracked).touch()
    identity = ["-c", "user.name=test", "-c", "user.email=test"]
    for arguments in (["init"], ["add", tracked], [*identity, "commit", "-m", "code"]):
        subprocess.run(["git", "-C", tmp_path, *arguments], capture_output=True, check=True)
    (tmp_path / file).write_text("new")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "skiprnn")
    provenance.code_version.cache_clear()
    try:
        version = provenance.code_version()
    finally:
        provenance.code_version.cache_clear()
    assert (version and version["dirty"]) == dirty


@pytest.mark.parametrize(("told", "dirty"), [("6aa0366", False), ("6aa0366-dirty", True)])
def test_a_copy_may_be_told_what_it_is_of(told, dirty, monkeypatch):
    monkeypatch.setenv("SKIPRNN_COMMIT", told)
    provenance.code_version.cache_clear()
    try:
        assert provenance.code_version() == {"commit": "6aa0366", "dirty": dirty}
    finally:
        provenance.code_version.cache_clear()


def test_learning_rate_rises_at_the_start_and_falls_at_the_end_in_equal_steps(small_run):
    course = ["training.warmup_epochs=1", "training.decay_epochs=2"]
    run = small_run("training.epochs=5", *course, "training.learning_rate=0.3")
    trained(run)
    rates = pd.read_csv(runs.RunFolder(run).path / "metrics.csv")["learning_rate"]
    assert list(rates) == pytest.approx([0.15, 0.3, 0.3, 0.2, 0.1])


def test_a_new_run_is_made_once(tmp_path, monkeypatch):
    made, make = [], setup.make_module
    monkeypatch.setattr(setup, "make_module", lambda run: made.append(run) or make(run))
    train.train(compose([*SMALL, *FEW, f"output={tmp_path}"]))
    assert len(made) == 1


def test_complete_run_is_not_repeated(small_run):
    run = small_run("training.epochs=1")
    record = trained(run)
    assert trained(run) == record


def test_a_longer_run_continues_a_shorter_one_to_the_same_end(small_run, tmp_path, monkeypatch):
    long = ["model=skip_lstm", "model.cost_per_sample=1e-3", "training.epochs=4"]
    anew = small_run(*long, f"output={tmp_path / 'anew'}")
    trained(anew)
    for epochs in (1, 2):
        trained(small_run(*long, f"training.epochs={epochs}"))
    run = small_run(*long)
    folder = runs.RunFolder(run)
    assert folder.epochs_done() == 2, "what is left is estimated by it"
    epochs_trained, end = [], RunKeeper.on_train_epoch_end
    monkeypatch.setattr(
        RunKeeper,
        "on_train_epoch_end",
        lambda self, trainer, module: (epochs_trained.append(trainer.current_epoch), end(self, trainer, module)),
    )
    trained(run)
    assert epochs_trained == [2, 3]
    assert_same_outcome(folder, runs.RunFolder(anew))


@pytest.mark.parametrize("other", ["training.decay_epochs=1", "training.learning_rate=0.1", "seed=1", "interrupted"])
def test_a_run_that_is_not_the_beginning_is_not_continued(other, small_run):
    changes = [] if other == "interrupted" else [other]
    trained(shorter := small_run(*changes, "training.epochs=1"))
    if other == "interrupted":
        runs.RunFolder(shorter).record_file.unlink()  # it may go on meanwhile
    longer = runs.RunFolder(small_run(*(changes if "decay" in other else []), "training.epochs=2"))
    assert longer.epochs_done() == 0
    longer.open().release()
    assert not longer.last.exists()


def test_diverged_run_is_marked_and_leaves_no_record(small_run):
    run = small_run("training.learning_rate=1e30")
    with pytest.raises(DivergedError, match=r"loss became (nan|inf) in epoch 0: lower training.learning_rate"):
        trained(run)
    folder = runs.RunFolder(run)
    assert not folder.complete
    assert folder.diverged
    assert "DivergedError" in json.loads(folder.failure_file.read_text())["error"]
    folder.fail(ConfigError("something else"))
    assert not folder.diverged


def test_one_process_per_run(small_run):
    run = small_run()
    lock = runs.RunFolder(run).open()
    try:
        with pytest.raises(ConfigError, match="another process is training this run"):
            trained(run)
    finally:
        lock.release()


def test_unwritable_output(small_run, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"output=.*cannot write"):
        trained(small_run(f"output={blocked}"))


FEW = ["training.epochs=2", "+training.train_batches=1", "+training.evaluation_batches=1"]


def damaged(file: Path, how: str, others: runs.RunFolder | None = None) -> bytes:
    """What stands in a file that was half written, or mistaken for another."""
    content = {"record.json": b"{}", "metrics.csv": b"epoch,loss\n0,1.0,2.0\n"}
    match how:
        case "empty":
            return b""
        case "half":
            return file.read_bytes()[: file.stat().st_size // 2]
        case "foreign":
            return content.get(file.name, b"PK\3\4 of another program")
        case _:
            assert others is not None
            return (others.path / file.name).read_bytes()


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """The output folder of two complete runs."""
    output = tmp_path_factory.mktemp("complete")
    run = command_line.read(compose([*SMALL, *FEW, f"output={output}"]))
    job.train([replace(run, seed=seed) for seed in (0, 1)])
    return output


@pytest.fixture
def complete(trained_once, small_run, tmp_path):
    """The folders of two complete runs."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return [runs.RunFolder(small_run(*FEW, f"seed={seed}")) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *product(["record.json", "last.ckpt", "best.ckpt", "metrics.csv"], ["empty", "half", "foreign"]),
        *product(["record.json", "last.ckpt", "best.ckpt"], ["of another seed"]),
    ],
)
def test_a_damaged_file_is_named_and_what_it_says_does_not_count(name, how, complete, monkeypatch):
    folder, others = complete
    record = folder.record()
    checkpoint = torch.load(folder.last, weights_only=True)
    if name == "best.ckpt":  # it is looked at where it is not of the last epoch
        checkpoint["callbacks"]["RunKeeper"]["best"] |= {"epoch": 0}
        torch.save(checkpoint, folder.last)
    file = folder.path / name
    file.write_bytes(damaged(file, how, others))
    if name != "record.json":
        folder.record_file.unlink()
    assert not folder.complete
    monkeypatch.setattr(SideBySide, "training_step", lambda *arguments: pytest.fail("trained with it"))
    with pytest.raises(ConfigError, match=rf"{file}.*delete (it|{folder.path})") as error:
        trained(folder.run)
    assert "\n" not in str(error.value)
    assert not folder.complete
    if name == "record.json":
        file.unlink()
        again = trained(folder.run)
        assert {key: again[key] for key in ("best", "final", "config")} == {
            key: record[key] for key in ("best", "final", "config")
        }


def test_the_best_checkpoint_is_of_the_best_epoch(complete):
    folder, _ = complete
    folder.record_file.unlink()
    last, best = (torch.load(file, weights_only=True) for file in (folder.last, folder.best))
    last["callbacks"]["RunKeeper"]["best"] |= {"epoch": 0}
    torch.save(last, folder.last)
    torch.save(best | {"epoch": 1}, folder.best)
    with pytest.raises(ConfigError, match=rf"best.ckpt is not of the best epoch; delete {folder.path} to begin anew"):
        trained(folder.run)


def test_a_best_checkpoint_is_none_to_go_on_from(complete):
    folder, _ = complete
    folder.record_file.unlink()
    folder.last.write_bytes(folder.best.read_bytes())
    with pytest.raises(ConfigError, match=r"last.ckpt holds weights alone, like best.ckpt; delete it to begin anew"):
        trained(folder.run)


def test_a_figure_is_drawn_of_the_run_s_own_checkpoint(complete):
    folder, others = complete
    (row,) = figures.complete([PlannedRun(Row("one"), folder.run, ())])
    assert figures.of_best(row, lambda module: f"seed {module.run.seed}") == f"seed {folder.run.seed}"
    folder.best.write_bytes(others.best.read_bytes())
    with pytest.raises(ConfigError, match=r"best.ckpt is of another run; delete it"):
        figures.of_best(row, lambda module: "")


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "callbacks"])
def test_a_checkpoint_whose_content_does_not_fit(part, complete):
    folder, _ = complete
    folder.record_file.unlink()
    content = torch.load(folder.last, weights_only=True)
    wrong = {name: value[:3] if value.dim() else value for name, value in content["state_dict"].items()}
    torch.save(content | {part: {"state_dict": wrong, "optimizer_states": [], "callbacks": {}}[part]}, folder.last)
    with pytest.raises(ConfigError, match=r"another architecture: size mismatch|last.ckpt is damaged"):
        trained(folder.run)


def test_a_record_says_its_task_and_older_ones_are_given_it(small_run):
    run = small_run(*FEW, "data=adding", "data.batches_per_epoch=1")
    folder = runs.RunFolder(run)
    assert trained(run)["task"] == "regression"
    older = {key: value for key, value in json.loads(folder.record_file.read_text()).items() if key != "task"}
    folder.record_file.write_text(json.dumps(older))
    assert folder.record()["task"] == "regression"


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "metrics.csv", "record.json", "config.yaml", ""])
def test_a_full_disk_is_one_line_and_with_space_the_run_continues(name, small_run, tmp_path, monkeypatch):
    """A file cannot be written, some for the second time; or nothing can be written."""
    run, other = small_run(*FEW), small_run(*FEW, f"output={tmp_path / 'with space'}")
    folder, fsync, written = runs.RunFolder(run), os.fsync, Counter()
    at = 2 if name in ("last.ckpt", "metrics.csv") else 1

    def full(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".", 1)[1].rpartition(".")[0]
        written[file] += 1
        if not name or (file == name and written[file] == at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(runs.os, "fsync", full)
        with pytest.raises(runs.StorageError, match=rf"^cannot write .*{name}: No space left on device; .*continues$"):
            trained(run)
    assert not folder.complete
    assert folder.failure_file.exists() == (name not in ("config.yaml", ""))
    assert not list(folder.path.glob(".*.*.*")), "half a file"
    trained(run)
    trained(other)
    assert_same_outcome(folder, runs.RunFolder(other))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    runs.write_atomically(file, b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        runs.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_written_files_are_readable_as_the_umask_says(tmp_path):
    (tmp_path / "plain").touch()
    runs.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_epoch_trained_again_replaces_its_row(tmp_path):
    logger = MetricsFile(str(tmp_path))
    for epoch, loss in [(0, 1.0), (1, 2.0), (1, 3.0)]:
        logger.log_metrics({"epoch": epoch, "loss": loss})
        logger.write()
    assert pd.read_csv(logger.file).to_dict("list") == {"epoch": [0, 1], "loss": [1.0, 3.0]}

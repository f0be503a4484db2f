"""Runs packed into one job end as if each had been alone, bit for bit, whatever was trained alone before."""

import json
import os
import signal
from dataclasses import replace

import pytest
from conftest import SMALL, command, trained
from test_runs import assert_same_outcome

from skiprnn.training import folder as runs
from skiprnn.training import job, module
from skiprnn.training.config import ConfigError, DivergedError
from skiprnn.training.keeper import RunKeeper
from skiprnn.training.module import SequenceModule, SideBySide

MODELS = {
    "skip": ["model=skip_lstm", "model.cost_per_sample=1e-3"],
    "random steps": ["model=random_skip_gru", "model.dropout=0.2"],
}
SHORT = ["training.epochs=3", "+training.train_batches=2"]


@pytest.fixture
def seeds(small_run, tmp_path):
    """A function: overrides -> three runs of one row in a folder of their own."""

    def make(folder: str, *overrides: str):
        run = small_run(*SHORT, *overrides, f"output={tmp_path / folder}")
        return [replace(run, seed=seed) for seed in (0, 1, 2)]

    return make


@pytest.fixture(autouse=True)
def records_without_pack(monkeypatch):
    """A record says how many runs shared the job; nothing else may differ."""
    record = runs.RunFolder.record
    monkeypatch.setattr(
        runs.RunFolder,
        "record",
        lambda self: {k: v for k, v in record(self).items() if k not in ("pack", "places", "threads")},
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_pack_equals_single_runs(model, seeds):
    alone, packed = seeds("alone", *MODELS[model]), seeds("packed", *MODELS[model])
    for run in alone:
        trained(run)
    job.train(packed)
    for one, other in zip(alone, packed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def test_rows_side_by_side_equal_single_runs(small_run, tmp_path):
    """Runs of several architectures, λ and p_skip."""
    rows = [
        ["model=lstm"],
        ["model=random_skip_gru", "model.p_skip=0.2"],
        ["model=skip_lstm", "model.cost_per_sample=1e-3"],
        ["model=random_skip_gru", "model.p_skip=0.6", "model.dropout=0.2"],
        ["model=skip_lstm", "model.cost_per_sample=1e-2"],
    ]
    alone, packed = (
        [small_run(*SHORT, *row, f"seed={seed}", f"output={tmp_path / folder}") for seed, row in enumerate(rows)]
        for folder in ("alone", "packed")
    )
    for run in alone:
        trained(run)
    job.train(packed)
    for one, other in zip(alone, packed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def test_runs_of_other_protocols_are_not_trained_side_by_side(small_run):
    with pytest.raises(ConfigError, match="must agree in data and training"):
        job.train([small_run(), small_run("training.batch_size=64")])


def test_where_epochs_take_seconds_not_every_one_is_written(seeds, monkeypatch):
    """On a GPU. What is not written when it is told to end is written then, and the last epoch is in any case."""
    alone, packed = seeds("alone"), seeds("packed")
    for run in alone:
        trained(run)
    written, save, step, calls = [], runs.RunFolder.save, SideBySide.training_step, iter(range(9))
    monkeypatch.setitem(module.WRITTEN_EVERY, "cpu", 1e9)
    monkeypatch.setattr(
        runs.RunFolder,
        "save",
        lambda self, file, content: (written.append((file.name, content["epoch"])), save(self, file, content)),
    )

    def ending_step(self, *arguments):
        if next(calls, 9) == 4:  # the first batch of the third epoch
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *arguments)

    monkeypatch.setattr(SideBySide, "training_step", ending_step)
    with pytest.raises(KeyboardInterrupt):
        job.train(packed)
    assert written.count(("last.ckpt", 1)) == 3, "with a batch of the third epoch"
    assert ("last.ckpt", 0) not in written
    job.train(packed)
    assert written.count(("last.ckpt", 2)) == 3
    for one, other in zip(alone, packed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def stop_after(monkeypatch, epochs: int) -> None:
    """Runs are interrupted when their keepers have written so many epochs."""
    end = RunKeeper.on_train_epoch_end

    def stop(self, trainer, module):
        end(self, trainer, module)
        if trainer.current_epoch + 1 >= epochs:
            raise InterruptedError

    monkeypatch.setattr(RunKeeper, "on_train_epoch_end", stop)


def test_a_pack_continues_runs_begun_alone(seeds, monkeypatch):
    """One run is an epoch ahead, one has begun, one has not."""
    alone, packed = seeds("alone"), seeds("packed")
    for run in alone:
        trained(run)
    for run, epochs in zip(packed, (2, 1), strict=False):
        with monkeypatch.context() as patch:
            stop_after(patch, epochs)
            with pytest.raises(InterruptedError):
                trained(run)
    job.train(packed)
    for one, other in zip(alone, packed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def test_single_runs_continue_a_pack(seeds, monkeypatch):
    alone, packed = seeds("alone"), seeds("packed")
    for run in alone:
        trained(run)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # the first run's checkpoint is an epoch ahead of the others'
        with pytest.raises(InterruptedError):
            job.train(packed)
    for run in packed:
        trained(run)
    for one, other in zip(alone, packed, strict=True):
        assert_same_outcome(runs.RunFolder(one), runs.RunFolder(other))


def test_a_diverged_run_leaves_the_others_alone(seeds, monkeypatch):
    alone, packed = seeds("alone"), seeds("packed")
    results = SequenceModule.results

    def diverging(self, stage):
        if self.run.seed == 1 and self.epoch == 1:
            raise DivergedError("seed 1: the loss became nan", self.run)
        return results(self, stage)

    for run in (alone[0], alone[2]):
        trained(run)
    monkeypatch.setattr(SequenceModule, "results", diverging)
    with pytest.raises(DivergedError, match="seed 1: the loss became nan"):
        job.train(packed)
    assert runs.RunFolder(packed[1]).failure_file.exists()
    assert not runs.RunFolder(packed[1]).complete
    for index in (0, 2):
        assert_same_outcome(runs.RunFolder(alone[index]), runs.RunFolder(packed[index]))


def test_a_sweep_packs_the_seeds_of_a_row(tmp_path):
    grid = ["-m", "model=gru", "seed=0,1,2", "pack=2", *SMALL, *SHORT]
    done = command(*grid, "training.epochs=1", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("record.json")]
    assert sorted(record["pack"] for record in records) == [1, 2, 2]
    assert all([place["pack"] for place in record["places"]] == [record["pack"]] for record in records)


def test_without_a_sweep_there_is_one_run(tmp_path):
    done = command("seed=7", *SMALL, *SHORT, "training.epochs=1", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.rglob("record.json")
    assert record.parent.name.startswith("seed7_")

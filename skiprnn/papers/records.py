"""What runs ended with: read, measured, exchanged with what is published."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from skiprnn.model import pretrained
from skiprnn.papers.experiments import LAST, METRICS, SOLVED, Row
from skiprnn.papers.plan import PlannedRun
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import read_metrics, read_record, write_atomically

SECONDS = {  # of an epoch, and what they are; the first count no other work on the machine, where they are known
    "cpu_seconds": "seconds of CPU time, training and validation",
    "seconds": "seconds passed, training and validation",
}


def both_epochs(columns: Sequence[str]) -> list[str]:
    """The metrics of a table's columns: at the epoch with the best validation score, then those at the last one.

    The validation score knows nothing of the updates, and what is lost after the best epoch should be seen.
    """
    return [*columns, *(LAST + name for name in columns if LAST + name in METRICS)]


def measured(record: dict[str, Any], metric: str) -> float | None:
    """A metric of a run, of the test set: at the epoch with the best validation score, as the authors' script for MNIST
    asks for; or at the last epoch, where their scripts for the synthetic tasks stand when they are interrupted.
    """
    test = record["final" if metric.startswith(LAST) else "best"]["test"]
    match metric.removeprefix(LAST):
        case "task_solved":
            bound = record["solved_at"]
            return float(test["mse"] < bound if record["task"] == "regression" else test["accuracy"] > bound)
        case "state_updates_percent":
            return 100 * test["state_updates"] / record["steps"]
        case "inference_flops_with_cnn":
            cnn = record["input_flops"]  # of each frame that is used
            return None if cnn is None else test["inference_flops"] + test["state_updates"] * cnn
        case name:
            return test[name]


def steps_per_epoch(record: dict[str, Any]) -> int:
    """Updates of the weights in an epoch of a run."""
    data, training = record["config"]["data"], record["config"]["training"]
    batches = record["examples"]["train"] / training["batch_size"]
    whole = math.floor(batches) if data.get("drop_last") else math.ceil(batches)
    return min(whole, training["train_batches"] or whole)


def has_own_time(record: dict[str, Any]) -> bool:
    """Whether the seconds of a run are its own, not those of several that were trained side by side.

    A record that names no places is older than such training; where the list is empty, nobody knows.
    """
    places = record.get("places")
    return places is None or (bool(places) and all(place.get("pack") == 1 for place in places))


def read_curves(file: Path, record: dict[str, Any] | None) -> dict[str, list[float]]:
    """metrics.csv as read_metrics gives it, with seconds only where they are the run's own.

    Args:
        record: the run's; None: it is underway, and the file says whose time it was.
    """
    columns = read_metrics(file)
    own = has_own_time(record) if record else not any(pack > 1 for pack in columns.get("pack", ()))
    return {name: values for name, values in columns.items() if own or name not in SECONDS}


@dataclass(frozen=True)
class Results:
    """A row's runs that ended."""

    row: Row
    policy: str  # of their updates
    planned: int
    records: list[dict[str, Any]]  # of those with a result
    diverged: int = 0  # those without: they count, as runs that have not solved their task

    @property
    def done(self) -> int:
        return len(self.records) + self.diverged

    def values(self, metric: str) -> list[float]:
        """A metric of each run that has it."""
        values = [value for record in self.records if (value := measured(record, metric)) is not None]
        return values + [0.0] * self.diverged if metric.endswith(SOLVED) else values


def holds(expected: Any, found: Any) -> bool:
    """Whether all that is expected is found, in mappings within mappings."""
    if isinstance(expected, dict):
        return all(key in found and holds(value, found[key]) for key, value in expected.items())
    return expected == found


def results(planned: Sequence[PlannedRun]) -> Iterator[Results]:
    """The results of each row of a plan."""
    for row, group in groupby(planned, lambda one: one.row):
        runs = list(group)
        records = [one.folder.record() for one in runs if one.folder.complete]
        diverged = sum(one.folder.diverged for one in runs)
        yield Results(row, runs[0].run.model.policy, len(runs), records, diverged)


def read_published(file: Path) -> dict[str, Any]:
    """A published record.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        record = json.loads(file.read_bytes())
        run = RunConfig.of(record["config"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{file} is damaged; delete it") from None
    return record if "error" in record else read_record(file, run)


def weights_file(published: Path, name: str) -> Path:
    """Where the weights of a run are published.

    Args:
        published: folder of published results.
        name: of the run.
    """
    return published / "checkpoints" / name / pretrained.FILE


def exchange(planned: Sequence[PlannedRun], published: Path) -> None:
    """Copy the records of runs that ended, and their metrics per epoch where they are known, to the published ones, and
    the other way round: a run that another machine published is complete here as well, so that a table and its curves
    can be continued anywhere. The record of a diverged run has its error in place of results, and gives way to results.

    Raises:
        ConfigError: a published record is damaged, or another run's.
    """
    for one in planned:
        file, epochs = published / f"{one.run.name}.json", published / f"{one.run.name}.csv"
        folder = one.folder
        theirs = read_published(file) if file.exists() and not folder.complete else None
        if theirs and theirs["config"] != one.run.identity:
            raise ConfigError(f"{file} is the record of another run; delete it")
        if theirs and "error" not in theirs:
            folder.take_over(theirs, epochs.read_bytes() if epochs.exists() else None)
        elif folder.complete or folder.diverged:
            file.parent.mkdir(parents=True, exist_ok=True)
            if folder.complete:
                shutil.copyfile(folder.record_file, file)
            else:
                reason = json.loads(folder.failure_file.read_bytes())
                named = {"name": one.run.name, "hash": one.run.hash, "config": one.run.identity}
                write_atomically(file, json.dumps(named | reason, indent=2).encode())
            if folder.metrics_file.exists():
                shutil.copyfile(folder.metrics_file, epochs)
        elif theirs and not folder.last.exists():  # what is begun here may end otherwise
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.failure_file, json.dumps(theirs, indent=2).encode())
            if epochs.exists():
                write_atomically(folder.metrics_file, epochs.read_bytes())

"""The run folder: what is in it, when it is complete, how a killed run continues.

OUTPUT/DATASET/ROW/seedK_HASH/
  config.yaml    what the run is
  metrics.csv    one row per epoch (logger csv)
  last.ckpt      the last epoch, with optimiser and what has been kept: a killed run continues from it
  best.ckpt      the weights of the epoch with the best validation score
  record.json    provenance and results, written last and atomically: the run is complete when it exists
  failed.json    why the last attempt stopped, if it failed

Checkpoints and records name their run, and count for no other.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from skiprnn.model import pretrained
from skiprnn.training.config import ConfigError, DivergedError, RunConfig, fits
from skiprnn.training.measures import SCORES


class StorageError(OSError):
    """A file that cannot be written, for want of space or of the right to; the message is one line."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers, also after a kill, see the old content or the new, never a part.

    Raises:
        StorageError: it cannot be written; what was there is there.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot write {path}: {error.strerror or error}"
            raise StorageError(f"{reason}; with that mended, the same command continues") from error
        raise


def locked_files() -> set[int]:
    """Inodes of the files that processes of this machine have locked, as Linux tells it: no lock is tried."""
    file = Path("/proc/locks")
    return {int(line.split()[-3].split(":")[2]) for line in file.read_text().splitlines()} if file.exists() else set()


class RunFolder:
    """A run's files."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.path = Path(run.output) / run.name
        self.last, self.best = self.path / "last.ckpt", self.path / "best.ckpt"
        self.metrics_file = self.path / "metrics.csv"
        self.record_file, self.failure_file = self.path / "record.json", self.path / "failed.json"

    @property
    def complete(self) -> bool:
        """Whether the run's record is there, whole."""
        return self.record_file.exists() and self.damage is None

    @property
    def damage(self) -> str | None:
        """What is wrong with record.json, if one is there and cannot count."""
        with suppress(FileNotFoundError):
            try:
                self.record()
            except ConfigError as error:
                return str(error)
        return None

    @property
    def failure(self) -> str | None:
        """Why the run is not complete, as far as its folder tells."""
        if self.record_file.exists():
            return self.damage
        try:
            return str(json.loads(self.failure_file.read_bytes())["error"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError):
            return f"{self.failure_file} is damaged; the same command tries again"

    @property
    def diverged(self) -> bool:
        """Whether the run ended because its loss did: it is done, and has not learned."""
        return (self.failure or "").startswith(f"{DivergedError.__name__}:")

    def is_held(self, locked: Collection[int]) -> bool:
        """Whether a process of this machine is training the run.

        Args:
            locked: what locked_files gave.
        """
        lock = self.path / ".lock"
        return lock.exists() and lock.stat().st_ino in locked

    def state(self, locked: Collection[int]) -> str:
        """complete, running (see is_held), failed, stopped (begun, that is) or waiting."""
        if self.complete:
            return "complete"
        if self.is_held(locked):
            return "running"
        if self.failure:
            return "failed"
        return "stopped" if self.epochs_done() else "waiting"

    def record(self) -> dict[str, Any]:
        """The record of a complete run.

        Raises:
            ConfigError: it is damaged, or another run's.
            FileNotFoundError: there is none.
        """
        return read_record(self.record_file, self.run)

    def epochs_done(self) -> int:
        """Epochs that a restart would not repeat, as far as metrics.csv tells."""
        if not self.last.exists():
            return shorter.run.training.epochs if (shorter := self.shorter()) else 0
        return max(self.metrics_file.read_bytes().count(b"\n") - 1, 0) if self.metrics_file.exists() else 0

    def shorter(self) -> "RunFolder | None":
        """The longest complete run that is this one but for fewer epochs, and so its beginning."""
        others = {path.name for path in self.path.parent.glob(f"seed{self.run.seed}_*")} - {self.path.name}
        for run in self._beginnings() if others else ():
            folder = RunFolder(run)
            if folder.path.name in others and folder.complete and folder.last.exists():
                return folder
        return None

    def _beginnings(self) -> list[RunConfig]:
        """What this run is after fewer epochs, the longest first.

        Nothing where the learning rate falls towards the end: the epochs before depend on their number.
        """
        training = self.run.training
        if training.decay_epochs:
            return []
        least = max(training.cost_free_epochs + 1, training.warmup_epochs)
        fewer = range(training.epochs - 1, least - 1, -1)
        return [replace(self.run, training=replace(training, epochs=epochs)) for epochs in fewer]

    def open(self) -> FileLock:
        """Make the folder, lock it for this process, take over what a shorter run has done, forget leftovers of a
        kill; returns the lock, to be released.

        Raises:
            ConfigError: the folder cannot be written, another process is training this run, or a file in it is damaged.
            StorageError: no space is left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(f"{self.path}: another process is training this run") from None
        except OSError as error:
            raise ConfigError(f"output={self.run.output}: cannot write {self.path}: {error.strerror}") from None
        try:
            if self.damage:
                raise ConfigError(self.damage)
            for leftover in self.path.glob(".*.*.*"):
                leftover.unlink()
            if not self.last.exists() and (shorter := self.shorter()):
                for name in ("best", "metrics_file", "last"):  # last.ckpt last: all are here with it
                    if (file := getattr(shorter, name)).exists():
                        write_atomically(getattr(self, name), file.read_bytes())
            if self.metrics_file.exists():
                read_metrics(self.metrics_file)
            self._say_what_it_is()
            self.failure_file.unlink(missing_ok=True)
        except BaseException:
            lock.release()
            raise
        return lock

    def _say_what_it_is(self) -> None:
        config = json.dumps(self.run.identity, indent=2)  # JSON is YAML, and the same bytes each time
        write_atomically(self.path / "config.yaml", config.encode())

    def save(self, file: Path, content: dict[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            file: last or best.
            content: epoch, state_dict; and for last what `checkpoint` returns besides.
        """
        buffer = io.BytesIO()
        torch.save({"run": self.run.identity} | content, buffer)
        write_atomically(file, buffer.getvalue())

    def checkpoint(self, file: Path) -> dict[str, Any]:
        """A checkpoint of this run, or of one that is its beginning.

        Args:
            file: last or best.

        Returns:
            run (an identity), epoch, state_dict (on the CPU); of last also optimizer_states, of the one optimiser, and
            callbacks, where Lightning has kept RunKeeper's state.

        Raises:
            ConfigError: as read_checkpoint; or it is another run's, or not what its name says.
        """
        checkpoint = read_checkpoint(file)
        owner = checkpoint["run"]
        if owner != self.run.identity and owner not in [run.identity for run in self._beginnings()]:
            raise ConfigError(f"checkpoint {file} is of another run; delete it to begin anew")
        wanted = {"epoch", "optimizer_states", "callbacks"} if file == self.last else {"epoch"}
        if not wanted <= checkpoint.keys():
            raise ConfigError(f"checkpoint {file} holds weights alone, like best.ckpt; delete it to begin anew")
        return checkpoint

    def finish(self, results: dict[str, Any]) -> None:
        """Write the record, the run's name with its results: it is complete from here on."""
        run = self.run
        record = {"name": run.name, "hash": run.hash, "config": run.identity, "profile": run.profile} | results
        write_atomically(self.record_file, json.dumps(record, indent=2).encode())

    def fail(self, error: BaseException) -> None:
        """Say why the run stopped, where there is space to say it."""
        reason = {"error": f"{type(error).__name__}: {error}", "time": datetime.now(UTC).isoformat(timespec="seconds")}
        with suppress(StorageError):
            write_atomically(self.failure_file, json.dumps(reason, indent=2).encode())

    def take_over(self, record: dict[str, Any], metrics: bytes | None) -> None:
        """Be complete with what another machine has trained, unless a process here is training it.

        What was begun here is no part of that: it is kept, in a folder begun_TIME.

        Args:
            record: the run's, see read_record.
            metrics: the content of metrics.csv, if it is known.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return
        try:
            begun = [file for file in (self.last, self.best, self.metrics_file) if file.exists()]
            aside = self.path / f"begun_{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
            for file in begun:
                aside.mkdir(exist_ok=True)
                file.rename(aside / file.name)
            if metrics is not None:
                write_atomically(self.metrics_file, metrics)
            self._say_what_it_is()
            self.finish(record)
        finally:
            lock.release()


RECORDED: dict[str, Any] = {"steps": int, "solved_at": float | None, "input_flops": float | None}
TOLD: dict[str, Any] = {"note": str | None, "examples": dict, "profile": dict}  # if it is told at all


def _require_results(record: dict[str, Any]) -> None:
    """Raises KeyError or TypeError unless a record has what tables, figures and claims read of it."""
    facts = {name: (record[name], kind) for name, kind in RECORDED.items()}
    facts |= {name: (record[name], kind) for name, kind in TOLD.items() if name in record}
    read = (SCORES[record["task"]], "state_updates")
    for epoch in ("best", "final"):
        for stage, metrics in (("validation", read), ("test", (*read, "inference_flops"))):
            facts |= {f"{epoch}/{stage}/{name}": (record[epoch][stage][name], float) for name in metrics}
    if not all(fits(value, kind) for value, kind in facts.values()) or not 1 <= record["steps"] <= 2**40:
        raise TypeError


def read_record(file: Path, run: RunConfig) -> dict[str, Any]:
    """The record of a run. Older ones do not name their task: they are given it.

    Raises:
        ConfigError: it is damaged, or another run's.
        FileNotFoundError: there is none.
    """
    try:
        record = json.loads(file.read_bytes())
        if record["config"] != run.identity:
            raise ConfigError(f"{file} is the record of another run; delete it, and the run continues")
        record = {"task": "regression" if "mse" in record["best"]["test"] else "classification"} | record
        _require_results(record)
    except (FileNotFoundError, ConfigError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{file} is damaged; delete it, and the run continues from its last checkpoint") from None
    return record | {"name": run.name}  # where publishing puts it


def read_metrics(file: Path) -> dict[str, list[float]]:
    """metrics.csv by columns: among them epoch, from 0; nan where an epoch lacks a value.

    Raises:
        ConfigError: it is damaged, or there is none.
    """
    try:
        with file.open(newline="") as lines:
            names, *rows = csv.reader(lines)
        values = zip(*([float(cell or "nan") for cell in row] for row in rows), strict=True)
        columns = dict(zip(names, map(list, values), strict=True))
        columns["epoch"]
    except (OSError, ValueError, KeyError, csv.Error):
        raise ConfigError(f"{file} is damaged; delete it, and the curves begin with the next epoch") from None
    return columns


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project, also a published one, read as untrusted input (weights_only, safetensors).

    Returns:
        Among others "run", the run's identity, and "state_dict", on the CPU; a published one also has the run's
        "record".

    Raises:
        ConfigError: no file, a corrupt one, or another program's.
    """
    if path.suffix == pretrained.SUFFIX:
        try:
            record, tensors = pretrained.read(path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        state = {f"network.{name}": tensor for name, tensor in tensors.items()}
        return {"run": record["config"], "record": record, "state_dict": state}
    if not path.is_file():
        raise ConfigError(f"checkpoint {path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as parts:  # torch compresses nothing: the file has room for what is made of it
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("its parts say that they are larger than it is")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes of the reader is anybody's guess
        reason = f"corrupt or no checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"
        raise ConfigError(f"checkpoint {path} is {reason}; delete it to begin anew") from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "run"} <= checkpoint.keys():
        raise ConfigError(f"checkpoint {path} was not written by skiprnn.train")
    try:
        pretrained.check_sizes(path, dict(checkpoint["run"])["model"], checkpoint["state_dict"], "network.")
    except (ValueError, KeyError, TypeError):
        reason = "its tensors have other sizes than it says of its run"
        raise ConfigError(f"checkpoint {path} is damaged: {reason}; delete it to begin anew") from None
    return checkpoint


def load_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights.

    Raises:
        ConfigError: they belong to another architecture.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        differences = " ".join(str(error).split("\n\t")[1:]) or str(error)
        raise ConfigError(f"checkpoint {path} is of another architecture: {differences.strip()}") from None

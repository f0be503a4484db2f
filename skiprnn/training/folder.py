"""The run folder: what is in it, when it is complete, how a killed run continues.

OUTPUT/DATASET/ROW/seedK_HASH/
  config.yaml    what the run is
  metrics.csv    one row per epoch (logger csv)
  last.ckpt      the last epoch, with optimiser and loop state: a killed run continues from it
  best.ckpt      the weights of the epoch with the best validation score
  record.json    provenance and results, written last and atomically: the run is complete when it exists
  failed.json    why the last attempt stopped, if it failed
"""

import functools
import io
import json
import os
import pickle
import platform
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import pytorch_lightning as lightning
import torch
from filelock import FileLock, Timeout
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import TorchCheckpointIO

from skiprnn.model import pretrained
from skiprnn.training import measures as metrics
from skiprnn.training.config import ConfigError, RunConfig

RECORDED_PACKAGES = ("skiprnn", "torch", "pytorch-lightning", "numpy")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers, also after a kill, see the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class RunFolder:
    """A run's files.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, run: RunConfig):
        self.run = run
        self.path = Path(run.output) / run.name
        self.last, self.best = self.path / "last.ckpt", self.path / "best.ckpt"
        self.record_file, self.failure_file = self.path / "record.json", self.path / "failed.json"

    @property
    def complete(self) -> bool:
        return self.record_file.exists()

    def record(self) -> dict[str, Any]:
        """The record of a complete run."""
        return json.loads(self.record_file.read_text())

    def epochs_done(self) -> int:
        """Epochs that a restart would not repeat, as far as metrics.csv tells."""
        if not self.last.exists():
            return shorter.run.training.epochs if (shorter := self.shorter()) else 0
        file = self.path / MetricsFile.NAME
        return file.read_bytes().count(b"\n") - 1 if file.exists() else 0

    def shorter(self) -> "RunFolder | None":
        """The longest complete run that is this one but for fewer epochs, and so its beginning.

        None where the learning rate falls towards the end: the epochs before depend on their number.
        """
        training = self.run.training
        others = {path.name for path in self.path.parent.glob(f"seed{self.run.seed}_*")} - {self.path.name}
        if training.decay_epochs or not others:
            return None
        for epochs in range(training.epochs - 1, training.cost_free_epochs, -1):
            folder = RunFolder(replace(self.run, training=replace(training, epochs=epochs)))
            if folder.path.name in others and folder.complete and folder.last.exists():
                return folder
        return None

    def open(self) -> FileLock:
        """Make the folder, lock it for this process, take over what a shorter run has done, forget leftovers of a
        kill; returns the lock, to be released.

        Raises:
            ConfigError: the folder cannot be written, or another process is training this run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(blocking=False)
            if not self.last.exists() and (shorter := self.shorter()):
                for name in (self.best.name, MetricsFile.NAME, self.last.name):  # last.ckpt last: all are here with it
                    if (file := shorter.path / name).exists():
                        write_atomically(self.path / name, file.read_bytes())
        except Timeout:
            raise ConfigError(f"{self.path}: another process is training this run") from None
        except OSError as error:
            raise ConfigError(f"output={self.run.output}: cannot write {self.path}: {error.strerror}") from None
        for leftover in self.path.glob(".*.*.*"):
            leftover.unlink()
        self.failure_file.unlink(missing_ok=True)
        config = json.dumps(self.run.identity, indent=2)  # JSON is YAML, and the same bytes each time
        write_atomically(self.path / "config.yaml", config.encode())
        return lock

    def finish(self, record: dict[str, Any]) -> None:
        """Write the record: the run is complete from here on."""
        write_atomically(self.record_file, json.dumps(record, indent=2).encode())

    def fail(self, error: BaseException) -> None:
        """Say why the run stopped."""
        reason = {"error": f"{type(error).__name__}: {error}", "time": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self.failure_file, json.dumps(reason, indent=2).encode())


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of this project, also a published one, read as untrusted input (weights_only, safetensors).

    Returns:
        Among others "run", the run's identity, and "state_dict"; a published one also has the run's "record".

    Raises:
        ConfigError: no file, a corrupt one, or another program's.
    """
    if path.suffix == pretrained.SUFFIX:
        try:
            record, tensors = pretrained.read(path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        state = {f"network.{name}": tensor.to(device) for name, tensor in tensors.items()}
        return {"run": record["config"], "record": record, "state_dict": state}
    if not path.is_file():
        raise ConfigError(f"checkpoint {path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"checkpoint {path} is corrupt or no checkpoint ({str(error).splitlines()[0]}); delete it to begin anew"
        ) from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "run"} <= checkpoint.keys():
        raise ConfigError(f"checkpoint {path} was not written by skiprnn.train")
    return checkpoint


def load_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights.

    Raises:
        ConfigError: they belong to another architecture.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        differences = " ".join(str(error).split("\n\t")[1:]) or str(error)
        raise ConfigError(f"checkpoint {path} is of another architecture: {differences.strip()}") from None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all. (Lightning's own passes through the system's temporary folder,
    from where a move may be a copy.)"""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class MetricsFile(Logger):
    """metrics.csv: one row per epoch. An epoch that is trained again after a kill replaces its row.

    Args:
        save_dir: the run folder.
    """

    NAME = "metrics.csv"

    def __init__(self, save_dir: str):
        super().__init__()
        self.file = Path(save_dir) / self.NAME

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Hyperparameters are in config.yaml."""

    def log_metrics(self, metrics, step=None) -> None:
        row = pd.DataFrame([metrics])
        if self.file.exists():
            rows = pd.read_csv(self.file)
            row = pd.concat([rows[rows["epoch"] < metrics["epoch"]], row])
        write_atomically(self.file, row.to_csv(index=False).encode())


class RunKeeper(lightning.Callback):
    """Keeps the run folder: times epochs, logs their metrics, remembers the best, writes the checkpoints."""

    KEPT = ("best", "final", "seconds", "trained", "commits")  # in the checkpoint

    def __init__(self, folder: RunFolder, quiet: bool):
        self.folder, self.quiet = folder, quiet
        self.best: dict[str, Any] | None = None
        self.final: dict[str, Any] | None = None
        self.seconds = 0.0
        self.trained = {"examples": 0, "seconds": 0.0}
        self.commits: list[dict[str, Any] | None] = [code_version()]  # that trained it, one after the other
        self.started = self.told = time.perf_counter()
        self.train_seconds = self.started_cpu = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, state_dict.get(name, []))  # older checkpoints name no commits
        if code_version() not in self.commits[-1:]:
            self.commits = [*self.commits, code_version()]

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def on_validation_start(self, trainer, module) -> None:
        module.results("train")  # stops a diverged run before time goes into validation; waits for the device
        self.train_seconds = time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch, task = trainer.current_epoch, module.data.task
        self.final = {"epoch": epoch} | {stage: module.results(stage) for stage in ("train", "validation")}
        seconds = time.perf_counter() - self.started
        examples = module.sums["train"].examples
        self.seconds += seconds
        self.trained = {
            "examples": self.trained["examples"] + examples,
            "seconds": self.trained["seconds"] + self.train_seconds,
        }
        row = {"epoch": epoch, "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]}
        row |= {
            f"{stage}/{key}": value for stage in ("train", "validation") for key, value in self.final[stage].items()
        }
        row |= {"examples_per_second": examples / self.train_seconds, "seconds": seconds}
        row |= {
            "cpu_seconds": time.process_time() - self.started_cpu
        }  # of all threads; what other work took is not in it
        for logger in trainer.loggers:
            logger.log_metrics(row, step=epoch)
        key = metrics.SCORES[task]
        score = self.final["validation"][key]
        # while λ counts as 0 the run is not yet what it is measured as
        if epoch >= self.folder.run.training.cost_free_epochs and (
            self.best is None
            or metrics.BETTER[task](score, self.best["validation"][key]) != self.best["validation"][key]
        ):
            self.best = self.final
            trainer.save_checkpoint(self.folder.best, weights_only=True)
        trainer.save_checkpoint(self.folder.last)
        self._tell(epoch, key, seconds)

    def _tell(self, epoch: int, key: str, seconds: float) -> None:
        """Without a progress bar: a line now and then."""
        epochs, now = self.folder.run.training.epochs, time.perf_counter()
        if not self.quiet or (now - self.told < 20 and epoch + 1 < epochs):
            return
        self.told = now
        assert self.final is not None
        validation = self.final["validation"]
        left = (epochs - epoch - 1) * seconds  # of the last epoch: they fall with the state updates
        print(
            f"{self.folder.run.name}  epoch {epoch + 1}/{epochs}  validation {key} {validation[key]:.4f}  "
            f"state updates {validation['state_updates']:.1f}  {duration(left)} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, digits in (("days", 172800, 1), ("h", 5400, 1), ("min", 90, 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


@functools.cache
def code_version() -> dict[str, Any] | None:
    """The git commit, and whether files differ from it, when this process first asked: what is committed later is not
    what it runs. Untracked files count where code and settings are. None outside a repository."""
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        added = git(
            "ls-files", "--others", "--exclude-standard", "--", folder.name, "conf", "experiments", "hydra_plugins"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed or added)}
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(device: torch.device, engine: str) -> dict[str, Any]:
    """Where a result comes from: code, versions, machine."""
    return {
        "git": code_version(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in RECORDED_PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "engine": engine,
    }

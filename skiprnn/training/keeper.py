"""Keeps the folder of a run while it is trained: metrics, checkpoints, a word now and then."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as lightning
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from skiprnn.training import measures, provenance
from skiprnn.training.folder import RunFolder, read_metrics, write_atomically
from skiprnn.training.module import SequenceModule
from skiprnn.training.timing import duration


class MetricsFile(Logger):
    """metrics.csv: one row per epoch. An epoch that is trained again after a kill replaces its row.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str):
        super().__init__()
        self.file = Path(save_dir) / "metrics.csv"
        self.rows: list[dict[str, Any]] = []  # not yet written

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Hyperparameters are in config.yaml."""

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append(metrics)

    def write(self) -> None:
        """Write what was logged since."""
        if not self.rows:
            return
        rows = pd.DataFrame(self.rows)
        if self.file.exists():
            earlier = pd.DataFrame(read_metrics(self.file)).astype({"epoch": int})
            rows = pd.concat([earlier[earlier["epoch"] < self.rows[0]["epoch"]], rows])
        write_atomically(self.file, rows.to_csv(index=False).encode())
        self.rows = []


class RunKeeper(lightning.Callback):
    """Keeps one run's folder: times epochs, logs their metrics, remembers the best, writes the checkpoints.

    It writes at the end of an epoch when the trainer's SideBySide says so, for all of its runs.

    Args:
        folder: of the run.
        module: the run, one of the trainer's.
        loggers: the run's.
        quiet: tell nothing, for there is a progress bar.
        pack: how many runs the trainer has; their time is that of all.
    """

    KEPT = ("best", "final", "seconds", "trained", "commits", "places")  # in the checkpoint

    def __init__(self, folder: RunFolder, module: SequenceModule, loggers: Sequence[Logger], quiet: bool, pack: int):
        self.folder, self.module, self.loggers, self.quiet, self.pack = folder, module, loggers, quiet, pack
        self.best: dict[str, Any] | None = None
        self.final: dict[str, Any] | None = None
        self.seconds = 0.0
        self.trained = {"examples": 0, "seconds": 0.0}
        self.commits: list[dict[str, Any] | None] = [provenance.code_version()]  # that trained it, one after the other
        self.places: list[dict[str, Any]] = []  # and where
        self.started = self.told = time.perf_counter()
        self.train_seconds = self.started_cpu = 0.0
        self.spent = (0.0, 0.0)  # seconds and CPU seconds on this epoch, by an earlier process
        self.unwritten = 0  # epochs
        self.better: dict[str, Any] | None = None  # what best.ckpt is to hold

    def restore(self, kept: dict[str, Any], within_epoch: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint has kept, also within an epoch."""
        if within_epoch:
            self.spent, self.module.begun = within_epoch["spent"], within_epoch
        for name in self.KEPT:
            setattr(self, name, kept.get(name, []))  # older checkpoints name no commits and places
        if (now := provenance.code_version()) not in self.commits[-1:]:
            self.commits = [*self.commits, now]

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started, self.started_cpu = time.perf_counter() - self.spent[0], time.process_time() - self.spent[1]
        self.spent = (0.0, 0.0)

    def on_validation_start(self, trainer, module) -> None:
        self.module.results("train")  # stops a diverged run before time goes into validation; waits for the device
        self.train_seconds = time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch, task = trainer.current_epoch, self.module.data.task
        self.final = {"epoch": epoch} | {stage: self.module.results(stage) for stage in ("train", "validation")}
        seconds = time.perf_counter() - self.started
        examples = self.module.sums["train"].examples
        self.seconds += seconds
        self.trained["examples"] += examples
        self.trained["seconds"] += self.train_seconds
        row = {"epoch": epoch, "learning_rate": self.module.learning_rate}
        row |= {
            f"{stage}/{key}": value for stage in ("train", "validation") for key, value in self.final[stage].items()
        }
        row |= {"examples_per_second": examples / self.train_seconds, "seconds": seconds}
        # of all threads; what other work took is not in it
        row |= {"cpu_seconds": time.process_time() - self.started_cpu}
        # the most runs whose time it was, so far
        row |= {"pack": max([self.pack, *(place.get("pack", 1) for place in self.places)])}
        for logger in self.loggers:
            logger.log_metrics(row, step=epoch)
        key = measures.SCORES[task]
        score = self.final["validation"][key]
        # while λ counts as 0 the run is not yet what it is measured as
        if epoch >= self.folder.run.training.cost_free_epochs and (
            self.best is None
            or measures.BETTER[task](score, self.best["validation"][key]) != self.best["validation"][key]
        ):
            self.best = self.final
            weights = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
            self.better = {"epoch": epoch, "state_dict": weights}
        self.unwritten += 1
        self.module.batches = 0
        if module.due:
            self._write(epoch)
        self._tell(epoch, key, seconds)

    def on_exception(self, trainer, module, exception) -> None:
        """Told to end (SIGTERM), which Lightning does after a batch: the run goes on from that one."""
        if not isinstance(exception, SIGTERMException):
            return
        if self.module.batches:
            spent = (time.perf_counter() - self.started, time.process_time() - self.started_cpu)
            self._write(trainer.current_epoch - 1, within_epoch=self.module.within_epoch() | {"spent": spent})
        elif self.unwritten and self.final:
            self._write(self.final["epoch"])

    def _write(self, epoch: int, **more: Any) -> None:
        """Write what is unwritten, and last.ckpt, of an epoch's end or of a batch's in the next."""
        for logger in self.loggers:
            if isinstance(logger, MetricsFile):
                logger.write()
        if self.better:
            self.folder.save(self.folder.best, self.better)
        self.unwritten, self.better = 0, None
        if (here := provenance.place(self.module.device, self.module.engine, self.pack)) not in self.places[-1:]:
            self.places = [*self.places, here]
        content = {
            "epoch": epoch,
            "state_dict": self.module.state_dict(),
            "optimizer_states": [self.module.adam.state_dict()],
            "callbacks": {type(self).__name__: {name: getattr(self, name) for name in self.KEPT}},
        }
        self.folder.save(self.folder.last, content | more)

    def _tell(self, epoch: int, key: str, seconds: float) -> None:
        """Without a progress bar: a line now and then."""
        epochs, now = self.folder.run.training.epochs, time.perf_counter()
        if self.quiet or (now - self.told < 20 and epoch + 1 < epochs):
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

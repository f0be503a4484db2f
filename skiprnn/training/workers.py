"""Where the runs of a sweep are trained: on this machine, in one process or several. On a cluster: see cluster."""

import os
import threading
import time
import traceback
from collections.abc import Collection, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Protocol

import torch
from joblib import Parallel, delayed, effective_n_jobs
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from skiprnn.training import job
from skiprnn.training.config import ConfigError, DivergedError, RunConfig
from skiprnn.training.folder import RunFolder, locked_files, read_metrics
from skiprnn.training.job import Draw
from skiprnn.training.timing import duration

MOST = 1024  # processes
ATTEMPTS = 3  # launches that bring no run further, before it is given up

Packs = list[list[RunConfig]]  # jobs: runs that are trained side by side


class Place(Protocol):
    """Somewhere to train runs."""

    workers: int  # jobs that run at once
    here: bool  # on this machine, so that an epoch can be timed on it
    gpu: bool  # jobs have a GPU

    def train(self, packs: Packs, draw: Draw) -> dict[str, str] | None:
        """Train runs to their end.

        Args:
            draw: as job.train's.

        Returns:
            Why runs failed, by their names; None if they were only submitted.
        """


def packed(runs: Sequence[RunConfig], gpu: bool) -> Packs:
    """Seeds of a row side by side: as many as `pack` says or, on a GPU, all of them.

    A process has one wandb page at a time: runs with a page are alone.
    """
    jobs: Packs = []
    latest: dict[str, list[RunConfig]] = {}  # the job of each row that may take another run
    for run in runs:
        size = 1 if "wandb" in run.logger else run.pack or (len(runs) if gpu and run.device != "cpu" else 1)
        row = repr(replace(run, seed=0))
        if row not in latest or len(latest[row]) >= size:
            latest[row] = []
            jobs.append(latest[row])
        latest[row].append(run)
    return jobs


def attempt(runs: Sequence[RunConfig], draw: Draw) -> dict[str, str]:
    """Train runs side by side; an error ends them alone.

    Returns:
        Why runs failed, by their names.
    """
    job.quieten()
    try:
        job.train(runs, draw)
    except DivergedError:
        return {run.name: RunFolder(run).failure or "" for run in runs if not RunFolder(run).complete}
    except job.USER_ERRORS as error:
        return {run.name: str(error) for run in runs if not RunFolder(run).complete}
    except Exception as error:
        traceback.print_exc()
        for folder in map(RunFolder, runs):
            folder.fail(error)
        return {run.name: repr(error) for run in runs}
    return {}


def attempt_in_worker(runs: Sequence[RunConfig], draw: Draw) -> dict[str, str]:
    """The same in a process that ends with the one that started it, however that ends."""
    if not any(thread.name == "parent" for thread in threading.enumerate()):
        threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    return attempt(runs, draw)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)  # files are written whole or not at all


class Display:
    """On a terminal: a line for each run that is being trained, and one for all, from the run folders."""

    def __init__(self, packs: Packs):
        self.left = [RunFolder(run) for pack in packs for run in pack]
        self.runs, self.began = len(self.left), time.monotonic()

    def live(self) -> AbstractContextManager:
        """Shown while it lasts."""
        if not job.on_terminal():
            return nullcontext()
        return Live(get_renderable=lambda: self, refresh_per_second=1, transient=True)

    def __rich__(self) -> Table:
        locked = locked_files()
        self.left = [one for one in self.left if not (one.record_file.exists() or one.failure_file.exists())]
        lines = Table.grid(padding=(0, 2))
        for folder in self.left:
            if folder.is_held(locked):
                self._line(lines, folder)
        over = self.runs - len(self.left)
        passed = duration(time.monotonic() - self.began)
        lines.add_row("all runs", ProgressBar(self.runs, over, width=20), f"{over} / {self.runs}", f"{passed} so far")
        return lines

    def _line(self, lines: Table, folder: RunFolder) -> None:
        epochs, said = folder.run.training.epochs, ""
        with suppress(ConfigError):  # before the first epoch is over
            metrics = read_metrics(folder.metrics_file)
            key = next(name for name in ("accuracy", "mse") if f"validation/{name}" in metrics)
            score, updates = (metrics[f"validation/{name}"][-1] for name in (key, "state_updates"))
            left = duration((epochs - folder.epochs_done()) * metrics["seconds"][-1])
            said = f"{key} {score:.3f}, updates {updates:.1f}, {left} left"
        done = folder.epochs_done()
        lines.add_row(folder.run.name, ProgressBar(epochs, done, width=20), f"{done} / {epochs}", said)


class Here:
    """This machine.

    Args:
        n_jobs: processes; 1: this one; -1: one per core.
    """

    here = True

    def __init__(self, n_jobs: int = 1):
        try:
            self.workers = effective_n_jobs(n_jobs)
            if type(n_jobs) is not int or self.workers > MOST:
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(
                f"hydra.launcher.n_jobs={n_jobs}: a number of processes, or -1 for one per core, at most {MOST}"
            ) from None
        self.gpu = torch.cuda.is_available()

    def train(self, packs: Packs, draw: Draw) -> dict[str, str]:
        """See Place. When a process is killed, all stop, and start anew with what is left, where each run continues."""
        if self.workers == 1:
            return {name: reason for pack in packs for name, reason in attempt(pack, draw).items()}
        failures: dict[str, str] = {}
        attempts = 0
        while packs and attempts < ATTEMPTS:
            before = progress(packs)
            try:
                calls = [delayed(attempt_in_worker)(pack, draw) for pack in packs]
                with Display(packs).live():
                    for found in Parallel(self.workers, batch_size=1)(calls):
                        failures |= found
                return failures
            except BrokenExecutor as error:
                reason = str(error).splitlines()[0]
            attempts = 0 if progress(packs) != before else attempts + 1
            packs = unfinished(packs)
            print(f"a process was killed; {sum(map(len, packs))} runs are left, and continue", flush=True)
        return failures | {run.name: reason for pack in packs for run in pack}


def unfinished(packs: Packs, settled: Collection[str] = ()) -> Packs:
    """What is neither complete nor diverged, and not settled otherwise; these are names."""
    left = [
        [run for run in pack if run.name not in settled and not (RunFolder(run).complete or RunFolder(run).diverged)]
        for pack in packs
    ]
    return [pack for pack in left if pack]


def progress(packs: Packs) -> list[tuple[bool, int]]:
    """Something that changes when a run gets further."""
    folders = [RunFolder(run) for pack in packs for run in pack]
    return [(one.complete, one.last.stat().st_mtime_ns if one.last.exists() else 0) for one in folders]

"""A cluster as a place where runs are trained: submit them, and wait for them."""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock

from skiprnn.training.cluster import submissions
from skiprnn.training.cluster.submissions import OVER, Submitted
from skiprnn.training.cluster.work import Job
from skiprnn.training.config import PACKAGE, ConfigError, RunConfig, packaged
from skiprnn.training.folder import write_atomically
from skiprnn.training.job import Draw
from skiprnn.training.provenance import SNAPSHOT, code_version
from skiprnn.training.workers import ATTEMPTS, Packs, progress, unfinished

POLLING = (1.0, 15.0)  # seconds from a look at the queue to the next, at first and later on
TELLING = (60.0, 600.0)  # seconds from a line on how things stand to the next: if they changed, if they did not


class Waiting:
    """A job that is waited for.

    Args:
        job: what was submitted.
        runs: of the sweep, by name; the job may have others as well.
        attempts: jobs before it that brought these runs no further.
    """

    def __init__(self, job: Submitted, runs: Mapping[str, RunConfig], attempts: int):
        self.job, self.attempts, self.state = job, attempts, ""
        packs = [[runs[name] for name in pack if name in runs] for pack in job.packs]
        self.packs = self.rest = [pack for pack in packs if pack]
        self.progress = progress(self.packs)

    @property
    def failures(self) -> dict[str, str]:
        """Why runs of the sweep failed, by their names."""
        ours = {run.name for pack in self.packs for run in pack}
        return {name: reason for name, reason in self.job.failures.items() if name in ours}

    def left(self) -> Packs:
        """What is neither complete nor failed."""
        self.rest = unfinished(self.rest, self.failures)
        return self.rest

    def is_over(self, state: str) -> bool:
        """Seen twice in a row: what a job wrote may arrive later than the news of its end.

        Args:
            state: as the queue has it now; that it has forgotten the job does not change how the job ended.
        """
        before = self.state
        if state != "GONE" or before not in OVER:
            self.state = state
        return before in OVER and self.state in OVER


class Cluster:
    """A place (see workers) that trains runs as jobs. What a job has already, whoever submitted it, is waited for.

    Args:
        output: where run folders are made.
        max_jobs: of an array; None: any number.
        settings: conf/hydra/launcher/slurm.yaml's; what is not named here is submitit.AutoExecutor's.

    Raises:
        ConfigError: settings that cannot work.
    """

    def __init__(
        self,
        output: Path,
        max_jobs: int | None,
        *,
        cluster: str,
        runs_per_job: int,
        max_num_timeout: int,
        detach: bool,
        **settings: Any,
    ):
        self.folder, self.cluster, self.runs_per_job = (output / "submitit").resolve(), cluster, runs_per_job
        self.max_jobs = 1 if cluster == "local" else max_jobs  # there, a job is found by its submission
        self.timeouts, self.detach, self.settings = max_num_timeout, detach, settings
        self.here = cluster == "local"
        self.gpu = torch.cuda.is_available() if self.here else bool(settings["gpus_per_node"])
        self.workers = settings["slurm_array_parallelism"]
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise ConfigError("hydra/launcher=slurm: this machine has no sbatch; start the sweep on a login node")
        if runs_per_job < 1:
            raise ConfigError(f"hydra.launcher.runs_per_job={runs_per_job}: must be at least 1")
        minutes, delay = settings["timeout_min"], settings["slurm_signal_delay_s"]
        if minutes * 60 <= delay:
            raise ConfigError(
                f"hydra.launcher.timeout_min={minutes}: a job is told {delay} s before its time is up, and so at once; "
                "raise it, or lower hydra.launcher.slurm_signal_delay_s"
            )
        self.executor(self.folder, sys.executable)  # for its errors

    def executor(self, folder: Path, python: str) -> Any:
        """Submitit's.

        Raises:
            ConfigError: no submitit, no such cluster, or a setting that it does not take.
        """
        try:
            import submitit
        except ModuleNotFoundError:
            raise ConfigError("hydra/launcher=slurm needs submitit: pip install 'skiprnn[slurm]'") from None
        settings = dict(self.settings)
        if cpus := settings.get("cpus_per_task"):  # since 22.05 srun takes one CPU, whatever sbatch was given
            settings["slurm_srun_args"] = [f"--cpus-per-task={cpus}", *settings.get("slurm_srun_args", ())]
        own = {f"{self.cluster}_python": python, f"{self.cluster}_max_num_timeout": self.timeouts}
        try:
            executor = submitit.AutoExecutor(folder, self.cluster, **own)
            executor.update_parameters(**settings)
        except (ValueError, NameError, AssertionError, TypeError) as error:
            raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from None
        return executor

    def train(self, packs: Packs, draw: Draw) -> dict[str, str] | None:
        """See Place.

        Raises:
            ConfigError: the cluster refuses the jobs, or does not answer.
            KeyboardInterrupt: the jobs go on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.draw = draw
        jobs = self.hold(packs)
        if self.detach:
            return None
        try:
            return self.wait(jobs, sum(map(len, packs)))
        except KeyboardInterrupt:
            if self.cluster == "slurm":
                print("the jobs go on, and the same command waits for them", flush=True)
            raise

    def hold(self, packs: Packs, attempts: int = 0) -> list[Waiting]:
        """The jobs that have the runs of packs: what none has is submitted.

        Raises:
            ConfigError: the cluster refuses the jobs, or does not answer.
        """
        runs = {run.name: run for pack in packs for run in pack}
        with FileLock(self.folder / ".lock"):  # the same command twice submits once
            before = submissions.submitted(self.folder)
            known = submissions.states(before)
            jobs = [Waiting(job, runs, attempts) for job in before if known[job.id][0] not in OVER]
            jobs = [one for one in jobs if one.left()]
            held = {run.name for one in jobs for pack in one.left() for run in pack}
            if held:
                print(f"{len(held)} runs are in jobs that were submitted before", flush=True)
            free = unfinished(packs, held)
            chunks = [free[k : k + self.runs_per_job] for k in range(0, len(free), self.runs_per_job)]
            return jobs + [Waiting(job, runs, attempts) for job in self.submit(chunks)]

    @cached_property
    def code(self) -> Path:
        """What takes the place of this package's parent on Python's path: a copy of it with its configs, for jobs run
        the code that was submitted."""
        copy = self.folder / "code" / uuid4().hex
        for source, name in ((PACKAGE, ""), (packaged("conf"), "conf")):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / PACKAGE.name / name, ignore=ignored, dirs_exist_ok=True)
        (copy / PACKAGE.name / SNAPSHOT).write_text(json.dumps(code_version()))
        return copy

    def submit(self, chunks: Sequence[Packs]) -> list[Submitted]:
        """A job for each of the chunks, in arrays.

        Raises:
            ConfigError: the cluster refuses them.
        """
        if not chunks:
            return []
        from submitit.core.utils import FailedJobError

        # the current folder last: a data set may be the user's own
        path = os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH"), str(Path.cwd())]))
        python = shlex.join(["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", sys.executable])
        jobs: list[Submitted] = []
        size = self.max_jobs or len(chunks)
        for first in range(0, len(chunks), size):
            part = chunks[first : first + size]
            folder = self.folder / str(max(submissions.numbers(self.folder), default=0) + 1)
            folder.mkdir(exist_ok=True)
            names = [[[run.name for run in pack] for pack in packs] for packs in part]
            # before there are jobs: they begin with their pickles, which submitit puts in place last
            write_atomically(folder / "runs.json", json.dumps({"cluster": self.cluster, "jobs": names}).encode())
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    self.executor(folder, python).submit_array([Job(packs, self.draw, folder) for packs in part])
            except FailedJobError as error:
                (folder / "runs.json").unlink()
                others = f"; {first} jobs were submitted before that, and go on" if first else ""
                raise ConfigError(f"{submissions.last_line(str(error)) or 'sbatch failed'}{others}") from None
            jobs += submissions.jobs_in(folder)
        print(f"{len(jobs)} jobs submitted, their logs in {jobs[0].folder}/", flush=True)
        return jobs

    def wait(self, jobs: list[Waiting], total: int) -> dict[str, str]:
        """Wait for jobs; what was in one that died is submitted again while the others run.

        Args:
            total: runs of the sweep.

        Returns:
            Why runs failed, by their names.
        """
        failures: dict[str, str] = {}
        news = News(total)
        while jobs:
            news.pause()
            for file in {one.job.folder / "warnings" for one in jobs}:
                for line in file.read_text().splitlines() if file.exists() else ():
                    news.once(f"warning: {line}")
            try:
                known = submissions.states([one.job for one in jobs])
                for one in list(jobs):
                    ended = one.is_over(known[one.job.id][0]) or not one.left()
                    found, died = self.settle(one) if ended else (one.failures, [])
                    failures |= found
                    for name, reason in found.items():
                        news.once(f"failed: {reason}", f"failed: {name}: {reason}")
                    if died:
                        news.tell(f"job {one.job.id} died ({one.state.lower()}), and its runs continue in another")
                        jobs += self.hold(died, one.attempts + 1)
                    if ended:
                        jobs.remove(one)
            except ConfigError as error:  # the queue does not answer, or takes no jobs
                news.once(f"{error}; waiting for it")
                continue
            left = sum(len(pack) for one in jobs for pack in one.left())
            stand = Counter(known[one.job.id] for one in jobs if one.job.id in known and one.state not in OVER)
            news.standing(total - left - len(failures), len(failures), stand)
        return failures

    def settle(self, one: Waiting) -> tuple[dict[str, str], Packs]:
        """What became of a job's runs: why they failed, by their names; and what died with it, to be tried again."""
        if one.state == "GONE":
            one.state = submissions.last_state(one.job)
        if (now := progress(one.packs)) != one.progress:
            one.attempts, one.progress = 0, now
        failures, left = one.failures, one.left()
        if one.state == "CANCELLED":
            reason = f"job {one.job.id} was cancelled"
        elif one.attempts + 1 == ATTEMPTS:
            reason = f"{ATTEMPTS} jobs died and brought it no further; the last: {one.job.last_words}"
        else:
            return failures, left
        return failures | {run.name: reason for pack in left for run in pack}, []


class News:
    """What is said while jobs are waited for: everything once, and how things stand now and then.

    Args:
        total: runs of the sweep.
    """

    def __init__(self, total: int):
        self.total, self.began, self.said = total, time.monotonic(), set[str]()
        self.stood, self.told = "", -TELLING[1]

    def pause(self) -> None:
        """Until the queue is to be asked again: soon at first, seldom later."""
        shortest, longest = POLLING
        time.sleep(min(longest, shortest + (time.monotonic() - self.began) / 20))

    def tell(self, line: str) -> None:
        print(f"{time.strftime('%H:%M')}  {line}", flush=True)

    def once(self, what: str, line: str = "") -> None:
        """Tell a line, or what it is about, unless that was said before."""
        if what not in self.said:
            self.said.add(what)
            self.tell(line or what)

    def standing(self, complete: int, failed: int, jobs: Mapping[tuple[str, str], int]) -> None:
        """Tell how far the runs are, how many jobs run, and why the others wait."""
        running = sum(count for (state, _), count in jobs.items() if state == "RUNNING")
        reasons = [
            f"{count} {state.lower()} ({reason})" for (state, reason), count in jobs.items() if state != "RUNNING"
        ]
        stands = f"{complete} of {self.total} runs complete" + (f", {failed} failed" if failed else "")
        stands += f"; jobs: {', '.join([f'{running} running', *reasons])}" if jobs else ""
        since = time.monotonic() - self.told
        if since > (TELLING[0] if stands != self.stood else TELLING[1]):
            self.stood, self.told = stands, time.monotonic()
            self.tell(stands)

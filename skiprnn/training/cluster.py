"""Runs as jobs of a cluster: what a job does, which were submitted, what has become of them. SLURM, by submitit.

A submission is a folder OUTPUT/submitit/NUMBER/: runs.json names the runs of each job, and submitit's files and the
jobs' logs lie beside it. So whoever comes later, the same command or skiprnn.status, finds the job of a run there, and
asks the queue about it. What has become of a run its own folder says.
"""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.workers import ATTEMPTS, Packs, attempt, progress, unfinished

PACKAGE = Path(__file__).resolve().parents[1]
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT", "GONE"}  # GONE: the queue knows nothing of it
POLLING = (1.0, 15.0)  # seconds from a look at the queue to the next, at first and later on
TELLING = (60.0, 600.0)  # seconds from a line on how things stand to the next: if they changed, if they did not


class Job:
    """What a job does; pickled by submitit. Requeued, it continues.

    Args:
        packs: its runs, one pack after the other.
        warnings: the file of what the sweep is to say at once.
    """

    def __init__(self, packs: Packs, warnings: Path):
        self.packs, self.warnings = packs, warnings

    def __call__(self) -> None:
        """Train what is not complete.

        Raises:
            SystemExit: a run failed, as its folder says; all others were tried.
        """
        self._pass_warnings_on()
        failures: dict[str, str] = {}
        for pack in self.packs:
            failures |= attempt(pack)
        if failures:
            sys.exit(f"error: {len(failures)} of {sum(map(len, self.packs))} runs failed")

    def checkpoint(self) -> Any:
        """What submitit requeues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _pass_warnings_on(self) -> None:
        """Our own warnings, such as that there is no compiler, also reach who waits for the job."""
        show = warnings.showwarning

        def show_and_pass_on(message, category, filename, *arguments, **options) -> None:
            show(message, category, filename, *arguments, **options)
            if Path(filename).is_relative_to(PACKAGE):
                with self.warnings.open("a") as lines:
                    lines.write(f"{socket.gethostname()}: {' '.join(str(message).split())}\n")

        warnings.showwarning = show_and_pass_on


def snapshot(folder: Path) -> Path:
    """A copy of this package below a folder: jobs run the code that was submitted.

    Returns:
        What takes the place of the package's parent on Python's path.
    """
    files = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    contents = {path.relative_to(PACKAGE.parent): path.read_bytes() for path in files}
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    if not (folder / digest).exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder, prefix="."))
        for path, content in contents.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_bytes(content)
        unfinished.chmod(0o755)
        unfinished.rename(folder / digest)
    return folder / digest


@dataclass(frozen=True)
class Submitted:
    """A job, as the folder of its submission tells it."""

    id: str  # SLURM's: 123, or 123_4 in an array; without a cluster, a process's
    cluster: str
    folder: Path  # of the submission
    packs: list[list[str]]  # names of its runs

    @property
    def log(self) -> Path:
        """What the job wrote to stderr."""
        return self.folder / f"{self.id}_0_log.err"


def submitted(folder: Path) -> list[Submitted]:
    """The jobs of all submissions into a folder OUTPUT/submitit, the latest last."""
    return [job for number in numbers(folder) for job in jobs_in(folder / str(number))]


def numbers(folder: Path) -> list[int]:
    """Of the submissions in a folder."""
    return sorted(int(file.parent.name) for file in folder.glob("*/runs.json"))


def jobs_in(folder: Path) -> list[Submitted]:
    """The jobs of a submission.

    One without a pickle was submitted by a process that died over it; submitit ends it after a minute.
    """
    content = json.loads((folder / "runs.json").read_text())
    ids = [file.name.removesuffix("_submitted.pkl") for file in folder.glob("*_submitted.pkl")]
    index = {id: int(id.split("_")[1]) if "_" in id else 0 for id in ids}
    ids.sort(key=index.__getitem__)
    return [Submitted(id, content["cluster"], folder, content["jobs"][index[id]]) for id in ids]


def states(jobs: Collection[Submitted]) -> dict[str, tuple[str, str]]:
    """What the queue says of jobs: id -> state, as squeue names it, and the reason for waiting.

    Raises:
        ConfigError: it does not answer.
    """
    known = {job.id: ("RUNNING", "None") for job in jobs if job.cluster == "local" and is_running(job)}
    if any(job.cluster == "slurm" for job in jobs):
        told = output_of(
            "squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r"
        )
        known |= {id: (state, reason) for id, state, reason in (line.split("|", 2) for line in told.splitlines())}
    return {job.id: known.get(job.id, ("GONE", "None")) for job in jobs}


def last_state(job: Submitted) -> str:
    """Of a job that the queue has forgotten, if SLURM keeps accounts."""
    with contextlib.suppress(ConfigError, IndexError):
        return output_of(
            "sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job.id}"
        ).split()[0]
    return "GONE"


def output_of(*command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        ConfigError: it failed, or is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise ConfigError(last_line(done.stderr) or f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def last_line(text: str) -> str:
    """That is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def is_running(job: Submitted) -> bool:
    """Whether a job's process runs, without a cluster."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(int(job.id), os.WNOHANG)
    try:
        return str(job.folder).encode() in Path("/proc", job.id, "cmdline").read_bytes()
    except OSError:
        return False


class Waiting:
    """A job that is waited for.

    Args:
        job: what was submitted.
        runs: the sweep's by name; the job may have others as well.
        attempts: jobs that brought these runs no further.
    """

    def __init__(self, job: Submitted, runs: Mapping[str, RunConfig], attempts: int = 0):
        self.job, self.attempts, self.over = job, attempts, False
        packs = [[runs[name] for name in pack if name in runs] for pack in job.packs]
        self.packs = [pack for pack in packs if pack]
        self.progress = progress(self.packs)

    def left(self) -> Packs:
        """What is not complete."""
        return unfinished(self.packs)

    def is_over(self, state: str) -> bool:
        """Seen twice in a row: what a job wrote may arrive later than the news of its end."""
        before, self.over = self.over, state in OVER
        return before and self.over


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
        own = {"max_num_timeout": self.timeouts, "python": python}
        try:
            executor = submitit.AutoExecutor(
                folder, self.cluster, **{f"{name}_{key}": own[key] for name in ("slurm", "local") for key in own}
            )
            executor.update_parameters(**settings)
        except (ValueError, NameError, AssertionError, TypeError) as error:
            raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from None
        return executor

    def train(self, packs: Packs) -> dict[str, str] | None:
        """See Place.

        Raises:
            ConfigError: the cluster refuses the jobs, or does not answer.
            KeyboardInterrupt: the jobs go on.
        """
        runs = {run.name: run for pack in packs for run in pack}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.code = snapshot(self.folder / "code")
        jobs = self.hold(packs, runs)
        if self.detach:
            return None
        try:
            return self.wait(jobs, runs)
        except KeyboardInterrupt:
            print("the jobs go on, and the same command waits for them", flush=True)
            raise

    def hold(self, packs: Packs, runs: Mapping[str, RunConfig], attempts: int = 0) -> list[Waiting]:
        """The jobs that have the runs of packs: what none has yet is submitted.

        Raises:
            ConfigError: the cluster refuses the jobs, or does not answer.
        """
        with FileLock(self.folder / ".lock"):  # the same command twice submits once
            before = submitted(self.folder)
            known = states(before)
            wanted = {run.name: run for pack in packs for run in pack}
            jobs = [Waiting(job, wanted, attempts) for job in before if known[job.id][0] not in OVER]
            jobs = [one for one in jobs if one.left()]
            held = {run.name for one in jobs for pack in one.left() for run in pack}
            if held:
                print(f"{len(held)} runs are in jobs that were submitted before", flush=True)
            free = [[run for run in pack if run.name not in held] for pack in packs]
            free = [pack for pack in free if pack]
            return jobs + self.submit(
                [free[k : k + self.runs_per_job] for k in range(0, len(free), self.runs_per_job)], runs, attempts
            )

    def submit(self, chunks: Sequence[Packs], runs: Mapping[str, RunConfig], attempts: int) -> list[Waiting]:
        """A job for each of the chunks, in arrays.

        Raises:
            ConfigError: the cluster refuses them.
        """
        from submitit.core.utils import FailedJobError

        path = os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH")]))
        python = shlex.join(["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", sys.executable])
        jobs: list[Waiting] = []
        size = self.max_jobs or len(chunks)
        for first in range(0, len(chunks), size or 1):
            part = chunks[first : first + size]
            for folder in (RunFolder(run) for packs in part for pack in packs for run in pack):
                folder.failure_file.unlink(missing_ok=True)  # of an earlier attempt
            place = self.folder / str(max(numbers(self.folder), default=0) + 1)
            place.mkdir(exist_ok=True)
            names = [[[run.name for run in pack] for pack in packs] for packs in part]
            # before there are jobs: they begin with their pickles, which submitit puts in place last
            write_atomically(place / "runs.json", json.dumps({"cluster": self.cluster, "jobs": names}).encode())
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    self.executor(place, python).submit_array([Job(packs, place / "warnings") for packs in part])
            except FailedJobError as error:
                (place / "runs.json").unlink()
                others = f"; {first} jobs were submitted before that, and go on" if first else ""
                raise ConfigError(f"{last_line(str(error)) or 'sbatch failed'}{others}") from None
            jobs += [Waiting(job, runs, attempts) for job in jobs_in(place)]
        if jobs:
            print(f"{len(jobs)} jobs submitted, their logs in {jobs[0].job.folder}/", flush=True)
        return jobs

    def wait(self, jobs: list[Waiting], runs: Mapping[str, RunConfig]) -> dict[str, str]:
        """Wait for jobs; what was in one that died is submitted again while the others run.

        Returns:
            Why runs failed, by their names.
        """
        failures: dict[str, str] = {}
        news = News(len(runs))
        while jobs:
            news.pause()
            folders = {one.job.folder for one in jobs}
            try:
                known = states([one.job for one in jobs])
                for one in list(jobs):
                    state = known[one.job.id][0]
                    if one.left() and not one.is_over(state):
                        continue
                    found, again = self.settle(one, state)
                    for name, reason in found.items():
                        news.once(f"failed: {reason}", f"failed: {name}: {reason}")
                    failures |= found
                    if again:
                        news.tell(f"job {one.job.id} died ({state.lower()}), and its runs continue in another")
                        jobs += self.hold(again, runs, one.attempts + 1)
                    jobs.remove(one)
            except ConfigError as error:  # the queue does not answer, or takes no jobs: later
                news.once(f"{error}; waiting for it")
                continue
            for file in (folder / "warnings" for folder in folders):
                for line in file.read_text().splitlines() if file.exists() else ():
                    news.once(f"warning: {line}")
            left = sum(len(pack) for one in jobs for pack in one.left())
            stand = Counter(known[one.job.id] for one in jobs if one.job.id in known)
            news.standing(len(runs) - left - len(failures), len(failures), stand)
        return failures

    def settle(self, one: Waiting, state: str) -> tuple[dict[str, str], Packs]:
        """What became of what a job has left: why runs failed, by their names; and what died with it."""
        if progress(one.packs) != one.progress:
            one.attempts, one.progress = 0, progress(one.packs)
        if state == "GONE":
            state = last_state(one.job)
        failures: dict[str, str] = {}
        for run in (run for pack in one.left() for run in pack):
            file = RunFolder(run).failure_file
            if file.exists():
                failures[run.name] = json.loads(file.read_text())["error"]
            elif state == "CANCELLED":
                failures[run.name] = f"job {one.job.id} was cancelled"
            elif one.attempts + 1 == ATTEMPTS:
                log = last_line(one.job.log.read_text(errors="replace")) if one.job.log.exists() else "it wrote nothing"
                failures[run.name] = f"{ATTEMPTS} jobs died and brought it no further; the last: {one.job.log}: {log}"
        again = [[run for run in pack if run.name not in failures] for pack in one.left()]
        return failures, [pack for pack in again if pack]


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

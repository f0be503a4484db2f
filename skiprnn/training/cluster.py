"""Runs as jobs of a cluster: what a job does, which were submitted, what has become of them. SLURM, by submitit.

A submission is a folder OUTPUT/submitit/NUMBER/, beside submitit's own files and the jobs' logs with
  runs.json       the runs of each job
  ID_failed.json  why runs of a job failed
  warnings        what the jobs have to say to whoever waits for them
So whoever comes later, the same command or skiprnn.status, finds there the job of a run, and asks the queue about it.
"""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
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

from skiprnn.training.config import ConfigError, RunConfig, packaged
from skiprnn.training.folder import write_atomically
from skiprnn.training.job import Draw
from skiprnn.training.provenance import SNAPSHOT, code_version
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
        draw: as job.train's.
        folder: of the submission.
    """

    def __init__(self, packs: Packs, draw: Draw, folder: Path):
        self.packs, self.draw, self.folder = packs, draw, folder
        self.in_vain = 0  # times that it came no further

    def __call__(self) -> None:
        """Train what is neither complete nor failed.

        Told that its time is up (SIGUSR2) or to end (SIGTERM), it stops after a batch, which is kept.

        Raises:
            SystemExit: it did not come to its end, or runs failed.
        """
        from submitit import JobEnvironment

        self.file = failures_file(self.folder, JobEnvironment().job_id)
        self.failures = read_failures(self.file)
        self._pass_warnings_on()
        before = progress(self.packs)
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # submitit's, which also ends the process
        told: list[int] = []

        def stop(number: int, frame: Any) -> None:
            told.append(number)
            if number == signal.SIGUSR2:
                os.kill(os.getpid(), signal.SIGTERM)  # Lightning knows this one, and ends training after the batch
            elif told.count(number) == 1 and signal.getsignal(number) is stop:  # no training is under way
                raise KeyboardInterrupt

        signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, stop)
        pack: list[RunConfig] = []
        try:
            for pack in self.left():
                self._note(attempt(pack, self.draw))
                if told:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if signal.SIGUSR2 not in told:
                sys.exit("error: told to end; what was done is kept")
            self.in_vain = 0 if progress(self.packs) != before else self.in_vain + 1
            if self.in_vain == ATTEMPTS:
                reason = (
                    f"{ATTEMPTS} times its time was up before it came any further: raise hydra.launcher.timeout_min"
                )
                self._note({run.name: reason for run in pack})
                self.in_vain = 0
            elif self.in_vain:
                self._pass_on(f"the time of job {JobEnvironment().job_id} was up before it came further")
            if self.left():
                requeue(signal.SIGUSR2, None)
        if self.failures:
            sys.exit(f"error: {len(self.failures)} of {sum(map(len, self.packs))} runs failed")

    def left(self) -> Packs:
        """What is neither complete nor failed."""
        return unfinished(self.packs, self.failures)

    def checkpoint(self) -> Any:
        """What submitit requeues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _note(self, failures: Mapping[str, str]) -> None:
        """Keep why runs failed."""
        self.failures |= failures
        write_atomically(self.file, json.dumps(self.failures).encode())

    def _pass_on(self, line: str) -> None:
        """To whoever waits for the job."""
        with (self.folder / "warnings").open("a") as lines:
            lines.write(f"{socket.gethostname()}: {line}\n")

    def _pass_warnings_on(self) -> None:
        """Our own, such as that there is no compiler."""
        show = warnings.showwarning

        def show_and_pass_on(message, category, filename, *arguments, **options) -> None:
            show(message, category, filename, *arguments, **options)
            if Path(filename).is_relative_to(PACKAGE):
                self._pass_on(" ".join(str(message).split()))

        warnings.showwarning = show_and_pass_on


def failures_file(folder: Path, id: str) -> Path:
    """Why runs of a job failed, by their names."""
    return folder / f"{id}_failed.json"


def read_failures(file: Path) -> dict[str, str]:
    return json.loads(file.read_bytes()) if file.exists() else {}


def snapshot(folder: Path) -> Path:
    """A copy of this package with its configs below a folder: jobs run the code that was submitted.

    Returns:
        What takes the place of the package's parent on Python's path.
    """
    places = {PACKAGE: PACKAGE.name, packaged("conf"): f"{PACKAGE.name}/conf"}
    contents = {
        Path(place, path.relative_to(source)): path.read_bytes()
        for source, place in places.items()
        for path in sorted(source.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    contents[Path(PACKAGE.name, SNAPSHOT)] = json.dumps(code_version()).encode()
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
    def failures(self) -> dict[str, str]:
        """Why runs failed, by their names."""
        return read_failures(failures_file(self.folder, self.id))

    @property
    def began(self) -> bool:
        """Whether it ever ran: it has a log from its first moment."""
        return (self.folder / f"{self.id}_0_log.out").exists()

    @property
    def last_words(self) -> str:
        """The last line that it wrote to stderr, and where."""
        log = self.folder / f"{self.id}_0_log.err"
        return f"{log}: {last_line(log.read_text(errors='replace'))}" if log.exists() else "it wrote nothing"


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
    """Of a job that the queue has forgotten.

    A task of an array that is cancelled before it begins leaves no trace in SLURM; others, if SLURM keeps accounts.
    """
    if job.cluster == "slurm" and not job.began:
        return "CANCELLED"
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
        runs: of the sweep, by name; the job may have others as well.
        attempts: jobs before it that brought these runs no further.
    """

    def __init__(self, job: Submitted, runs: Mapping[str, RunConfig], attempts: int):
        self.job, self.attempts, self.state = job, attempts, ""
        packs = [[runs[name] for name in pack if name in runs] for pack in job.packs]
        self.packs = [pack for pack in packs if pack]
        self.progress = progress(self.packs)
        self.rest = self.packs

    def left(self) -> Packs:
        """What is neither complete nor failed."""
        self.rest = unfinished(self.rest, self.job.failures)
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
        own = {"max_num_timeout": self.timeouts, "python": python}
        try:
            executor = submitit.AutoExecutor(
                folder, self.cluster, **{f"{name}_{key}": own[key] for name in ("slurm", "local") for key in own}
            )
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
        runs = {run.name: run for pack in packs for run in pack}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.code, self.draw = snapshot(self.folder / "code"), draw
        jobs = self.hold(packs)
        if self.detach:
            return None
        try:
            return self.wait(jobs, runs)
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
            before = submitted(self.folder)
            known = states(before)
            jobs = [Waiting(job, runs, attempts) for job in before if known[job.id][0] not in OVER]
            jobs = [one for one in jobs if one.left()]
            held = {run.name for one in jobs for pack in one.left() for run in pack}
            if held:
                print(f"{len(held)} runs are in jobs that were submitted before", flush=True)
            free = unfinished(packs, held)
            chunks = [free[k : k + self.runs_per_job] for k in range(0, len(free), self.runs_per_job)]
            return jobs + [Waiting(job, runs, attempts) for job in self.submit(chunks)]

    def submit(self, chunks: Sequence[Packs]) -> list[Submitted]:
        """A job for each of the chunks, in arrays.

        Raises:
            ConfigError: the cluster refuses them.
        """
        from submitit.core.utils import FailedJobError

        # the current folder last: a data set may be the user's own
        path = os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH"), str(Path.cwd())]))
        python = shlex.join(["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", sys.executable])
        jobs: list[Submitted] = []
        size = self.max_jobs or len(chunks)
        for first in range(0, len(chunks), size or 1):
            part = chunks[first : first + size]
            folder = self.folder / str(max(numbers(self.folder), default=0) + 1)
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
                raise ConfigError(f"{last_line(str(error)) or 'sbatch failed'}{others}") from None
            jobs += jobs_in(folder)
        if jobs:
            print(f"{len(jobs)} jobs submitted, their logs in {jobs[0].folder}/", flush=True)
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
            for file in {one.job.folder / "warnings" for one in jobs}:
                for line in file.read_text().splitlines() if file.exists() else ():
                    news.once(f"warning: {line}")
            try:
                known = states([one.job for one in jobs])
                for one in list(jobs):
                    ended = one.is_over(known[one.job.id][0]) or not one.left()
                    found, died = self.settle(one) if ended else (one.job.failures, [])
                    for name in found.keys() & runs.keys():
                        failures[name] = found[name]
                        news.once(f"failed: {found[name]}", f"failed: {name}: {found[name]}")
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
            news.standing(len(runs) - left - len(failures), len(failures), stand)
        return failures

    def settle(self, one: Waiting) -> tuple[dict[str, str], Packs]:
        """What became of a job's runs: why they failed, by their names; and what died with it, to be tried again."""
        if one.state == "GONE":
            one.state = last_state(one.job)
        if (now := progress(one.packs)) != one.progress:
            one.attempts, one.progress = 0, now
        failures, left = one.job.failures, one.left()
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

"""Which jobs were submitted, from their folders, and what has become of them, from the queue."""

import contextlib
import json
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from skiprnn.training.config import ConfigError

OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT", "GONE"}  # GONE: the queue knows nothing of it


def failures_file(folder: Path, id: str) -> Path:
    """Why runs of a job failed, by their names."""
    return folder / f"{id}_failed.json"


def read_failures(file: Path) -> dict[str, str]:
    return json.loads(file.read_bytes()) if file.exists() else {}


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
        told = output_of(f"squeue --noheader --array --states=all --user={os.getuid()} --format=%i|%T|%r")
        known |= {id: (state, reason) for id, state, reason in (line.split("|", 2) for line in told.splitlines())}
    return {job.id: known.get(job.id, ("GONE", "None")) for job in jobs}


def last_state(job: Submitted) -> str:
    """Of a job that the queue has forgotten.

    A task of an array that is cancelled before it begins leaves no trace in SLURM; others, if SLURM keeps accounts.
    """
    if job.cluster == "slurm" and not job.began:
        return "CANCELLED"
    with contextlib.suppress(ConfigError, IndexError):
        return output_of(f"sacct --noheader --allocations --parsable2 --format=State --jobs={job.id}").split()[0]
    return "GONE"


def output_of(command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        ConfigError: it failed, or is not there.
    """
    program, *arguments = command.split()
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{program}: {error}") from None
    if done.returncode:
        raise ConfigError(last_line(done.stderr) or f"{program}: exit status {done.returncode}")
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

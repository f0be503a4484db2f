"""What a job does; submitit (skiprnn[slurm]) calls it."""

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skiprnn.training.cluster.submissions import failures_file, read_failures
from skiprnn.training.config import PACKAGE, RunConfig
from skiprnn.training.folder import write_atomically
from skiprnn.training.job import Draw
from skiprnn.training.workers import ATTEMPTS, Packs, attempt, progress, unfinished


class Job:
    """Pickled by submitit. Requeued, it continues.

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
            if self.in_vain:
                self._give_up_or_tell(pack, JobEnvironment().job_id)
            if self.left():
                requeue(signal.SIGUSR2, None)
        if self.failures:
            sys.exit(f"error: {len(self.failures)} of {sum(map(len, self.packs))} runs failed")

    def _give_up_or_tell(self, pack: Sequence[RunConfig], id: str) -> None:
        """Its time was up while it trained a pack, and it came no further."""
        if self.in_vain < ATTEMPTS:
            self._pass_on(f"the time of job {id} was up before it came further")
            return
        reason = f"{ATTEMPTS} times its time was up before it came any further: raise hydra.launcher.timeout_min"
        self._note({run.name: reason for run in pack})
        self.in_vain = 0

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

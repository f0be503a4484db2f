"""Hydra's launcher for a cluster: a submitit job per run, which outlives time-outs, preemption and dead jobs."""

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ModuleNotFoundError:

    class BaseSubmititLauncher(Launcher):  # type: ignore[no-redef]
        """In its place without the extra: Hydra imports all plugins at every start."""

        def __init__(self, **settings: Any):
            sys.exit("error: hydra/launcher=slurm needs submitit: pip install 'skiprnn[slurm]'")

        def setup(self, **context: Any) -> None:
            """Never reached."""


class SubmititLauncher(BaseSubmititLauncher):
    """hydra-submitit-launcher's jobs, which are requeued with the same arguments and so find their run folder.

    Unlike there, one config serves every cluster that submitit knows, and a dead job does not leave the others alone:
    the sweep hears of it when all are over. Settings: `cluster` (slurm; or local, to try all this without one),
    `submitit_folder`, `max_num_timeout`, and what submitit.AutoExecutor takes.
    """

    def executor(self) -> Any:
        """Submitit's.

        Raises:
            ConfigError: no such cluster here, or a setting that submitit does not take.
        """
        import submitit

        from skiprnn.training.config import ConfigError

        settings = dict(self.params)
        folder, cluster, timeouts = (settings.pop(key) for key in ("submitit_folder", "cluster", "max_num_timeout"))
        if cluster == "slurm" and not shutil.which("srun"):
            raise ConfigError("hydra/launcher=slurm: this machine has no srun; start the sweep on a login node")
        try:
            executor = submitit.AutoExecutor(
                folder, cluster, slurm_max_num_timeout=timeouts, local_max_num_timeout=timeouts
            )
            executor.update_parameters(**settings)
        except (ValueError, NameError, AssertionError) as error:
            raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from None
        return executor

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises concurrent.futures.BrokenExecutor, after all jobs are over, if some died."""
        from submitit.core.utils import UncompletedJobError

        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_{number}", Singleton.get_state())
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        jobs = self.executor().map_array(self, *zip(*calls, strict=True))
        print(f"{len(jobs)} jobs submitted, their logs in {jobs[0].paths.folder.parent}/", flush=True)
        returns, dead = [], []
        for job in jobs:
            try:
                returns += job.results()
            except UncompletedJobError:
                dead.append(job.paths.stderr)
        if dead:
            raise BrokenExecutor(f"{len(dead)} of {len(jobs)} jobs died; see {dead[0]}")
        return returns

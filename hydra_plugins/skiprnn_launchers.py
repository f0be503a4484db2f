"""Hydra's launchers for this project. They only hold settings: the sweeper has the runs trained, see `place`.

Hydra's own way is to compose each job's config in the job, from what the configs are by then. Hydra imports all plugins
at every start: so no heavy import at the top.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher


class PlaceLauncher(Launcher):
    """A launcher that the sweeper asks for the place where runs are trained."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, **context: Any) -> None:
        """Nothing of Hydra's is needed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        raise TypeError("this launcher goes with hydra/sweeper=experiment")

    @abstractmethod
    def place(self, output: Path, max_jobs: int | None) -> Any:
        """The skiprnn.training.workers.Place of these settings.

        Args:
            output: where run folders are made.
            max_jobs: of an array; None: any number.

        Raises:
            skiprnn.training.config.ConfigError: they cannot work.
        """


class ProcessesLauncher(PlaceLauncher):
    """hydra/launcher=processes"""

    def place(self, output: Path, max_jobs: int | None) -> Any:
        from skiprnn.training.workers import Here

        return Here(**self.settings)


class SubmititLauncher(PlaceLauncher):
    """hydra/launcher=slurm"""

    def place(self, output: Path, max_jobs: int | None) -> Any:
        from omegaconf import OmegaConf

        from skiprnn.training.cluster.place import Cluster

        settings = OmegaConf.to_container(OmegaConf.create(self.settings))
        return Cluster(output, max_jobs, **settings)

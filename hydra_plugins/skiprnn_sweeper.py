"""Hydra's sweeper for this project: a grid, or the rows of an experiment; complete runs are skipped, failures told.

Hydra looks for plugins in the namespace package hydra_plugins, and imports them all at every start: so no heavy import
at the top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.skiprnn_launchers import PlaceLauncher


class ExperimentSweeper(BasicSweeper):
    """Plan, tell, launch what is incomplete, report, and make table and figures."""

    def sweep(self, arguments: list[str]) -> Any:
        from functools import partial

        from skiprnn.papers import sweep
        from skiprnn.training.config import ConfigError
        from skiprnn.training.workers import Here
        from skiprnn.views.figures import publish
        from skiprnn.views.samples import picture

        assert self.hydra_context is not None
        assert self.config is not None
        loader, master, launcher = self.hydra_context.config_loader, self.config, self.launcher

        def compose(overrides: Sequence[str]) -> Any:
            return loader.load_sweep_config(master, list(overrides))

        def place(output: Path) -> Any:
            if isinstance(launcher, PlaceLauncher):
                return launcher.place(output, self.max_batch_size)
            if isinstance(launcher, BasicLauncher):
                return Here()
            raise ConfigError("hydra/launcher: there are basic, processes, slurm")

        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        grid = self.split_arguments(parsed, None)[0]
        return sweep.run(grid, compose, place, " ".join(arguments), picture, partial(publish, every=False))

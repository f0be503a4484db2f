"""Hydra's sweeper for this project: a grid, or the rows of an experiment; complete runs are skipped, failures told.

Hydra looks for plugins in the namespace package hydra_plugins, and imports them all at every start: so no heavy import
at the top.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from joblib import effective_n_jobs


class ExperimentSweeper(BasicSweeper):
    """Plan, tell, launch what is incomplete, report, and make the experiment's table."""

    def sweep(self, arguments: list[str]) -> Any:
        import torch

        from skiprnn.papers import sweep

        assert self.hydra_context is not None
        assert self.launcher is not None
        assert self.config is not None
        loader, master, launcher = self.hydra_context.config_loader, self.config, self.launcher

        def compose(overrides: Sequence[str]) -> Any:
            return loader.load_sweep_config(master, list(overrides))

        def launch(jobs: list[list[str]]) -> list[Any]:
            size = self.max_batch_size or len(jobs)
            return [one for k in range(0, len(jobs), size) for one in launcher.launch(jobs[k : k + size], k)]

        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        grid = self.split_arguments(parsed, None)[0]
        settings = master.hydra.launcher
        workers = settings.get("slurm_array_parallelism") or effective_n_jobs(settings.get("n_jobs", 1))
        here = settings.get("cluster") != "slurm"
        gpu = torch.cuda.is_available() if here else bool(settings.gpus_per_node)
        return sweep.run(grid, compose, launch, workers, " ".join(arguments), here, gpu)

"""Train one run, or sweep over many.

    python -m skiprnn.train model=skip_lstm model.cost_per_sample=1e-4
    python -m skiprnn.train -m model=skip_lstm,skip_gru seed=0,1,2,3
    python -m skiprnn.train -m experiment=table1 data=mnist profile=mnist/cpu

See conf/README.md.
"""

import sys
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from skiprnn.training import config as configs
from skiprnn.training import job
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import RunFolder
from skiprnn.training.measures import SCORES
from skiprnn.views.samples import picture

CONF = str(Path(__file__).resolve().parent.parent / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(config: DictConfig) -> None:
    """Train the run of a config, or as a sweep's job the runs of a row side by side; print what came of them."""
    job.quieten()
    swept = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        run = configs.read(config)
        if run.experiment and not swept:
            raise ConfigError(f"experiment={run.experiment} is many runs: add -m")
        seeds = config["seeds"] if swept and (run.pack or 1) > 1 else [run.seed]
        runs = [replace(run, seed=seed) for seed in seeds]
        records = job.train(runs, picture)
    except (*job.USER_ERRORS, KeyboardInterrupt) as error:
        if swept:
            raise  # the sweep goes on, and reports it at the end
        sys.exit(job.INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"error: {error}")
    for run, record in zip(runs, records, strict=True):
        best, score = record["best"], SCORES[record["task"]]
        results = f"test {score} {best['test'][score]:.4f}, state updates {best['test']['state_updates']:.1f}"
        print(f"{run.name}: {results} (epoch {best['epoch'] + 1}, best on validation)  {RunFolder(run).path}")


if __name__ == "__main__":
    main()

"""Train one run, or sweep over many.

    python -m skiprnn.train model=skip_lstm model.cost_per_sample=1e-4
    python -m skiprnn.train -m model=skip_lstm,skip_gru seed=0,1,2,3
    python -m skiprnn.train -m experiment=table1 data=mnist profile=mnist/cpu
    python -m skiprnn.train -m experiment=table1 data=mnist profile=mnist/paper hydra/launcher=slurm --detach

See conf/README.md.
"""

import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from skiprnn.training import command_line, job
from skiprnn.training.config import ConfigError, packaged
from skiprnn.training.folder import RunFolder
from skiprnn.training.measures import SCORES
from skiprnn.views.samples import picture


@hydra.main(version_base="1.3", config_path=str(packaged("conf")), config_name="config")
def train(config: DictConfig) -> float:
    """Train the run of a config; print what came of it. Sweeps (-m) go to hydra_plugins/skiprnn_sweeper.py.

    Returns:
        What other sweepers of Hydra's search by: the best validation score or, with target_updates, how far from it
        the updates of the validation set are at the last epoch, as a share of the steps.
    """
    job.quieten()
    try:
        run = command_line.read(config)
        if run.experiment:
            raise ConfigError(f"experiment={run.experiment} is many runs: add -m")
        if run.pack and run.pack > 1:
            raise ConfigError(f"pack={run.pack} is for many runs: add -m, and seed=0,1")
        if HydraConfig.initialized():
            command = HydraConfig.get()
            command_line.require_own_profile(command)
            command_line.require_experiment(command.overrides.task)
        (record,) = job.train([run], picture)
    except job.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(job.INTERRUPTED)
    best, score = record["best"], SCORES[record["task"]]
    results = f"test {score} {best['test'][score]:.4f}, state updates {best['test']['state_updates']:.1f}"
    folder = RunFolder(run)
    print(f"{run.name}: {results} (epoch {best['epoch'] + 1}, best on validation)  {folder.path}")
    print(f"Next: python -m skiprnn.evaluate checkpoint={folder.best}; python -m skiprnn.dashboard {run.output}")
    target = command_line.read_sweep(config).target_updates
    if target is None:
        return best["validation"][score]
    return abs(record["final"]["validation"]["state_updates"] / record["steps"] - target)


def main() -> None:
    """The command, from sys.argv: Hydra's, and --detach, which makes a sweep on a cluster submit and not wait."""
    sys.argv[1:] = ["hydra.launcher.detach=true" if one == "--detach" else one for one in sys.argv[1:]]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its errors come here, to be one line
    command_line.arguments_of(get_args_parser())
    try:
        with command_line.refusals(sys.argv):
            train()
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

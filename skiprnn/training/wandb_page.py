"""A run, watched from outside while it goes: which samples it uses, as a picture, and its page on wandb."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as lightning
from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger

from skiprnn.training import measures
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.module import SequenceModule


class UsagePictures(lightning.Callback):
    """usage.png: what a Skip RNN or SA-RNN uses of test sequences, at the end; a wandb page gets it PICTURES times.

    Args:
        folder: of the run.
        module: the run.
        loggers: the run's.
        draw: a matplotlib figure of the module; raises ConfigError where nothing is to be seen.
    """

    PICTURES = 10

    def __init__(
        self,
        folder: RunFolder,
        module: SequenceModule,
        loggers: Sequence[Logger],
        draw: Callable[[SequenceModule], Any],
    ):
        pictures = self.PICTURES if "wandb" in folder.run.logger else 1
        self.folder, self.every = folder, -(-folder.run.training.epochs // pictures)
        self.module, self.loggers, self.draw = module, loggers, draw

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch = trainer.current_epoch
        if (epoch + 1) % self.every and epoch + 1 < self.folder.run.training.epochs:
            return
        self.module.eval()
        try:
            figure = self.draw(self.module)
        except ConfigError:
            return
        finally:
            self.module.train()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        write_atomically(self.folder.path / "usage.png", file.getvalue())
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("usage", [Image.open(file)], step=epoch)


class Page(WandbLogger):
    """A run's page, whose first chart is the validation score against the state updates, epoch by epoch.

    It has a section of its own, for a chart's horizontal axis goes with the name of what is drawn.
    """

    AGAINST = "against state updates"

    begun = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Also called with a picture."""
        for score in measures.SCORES.values():
            if (value := metrics.get(f"validation/{score}")) is not None:
                metrics = {**metrics, f"{self.AGAINST}/{score}": value}
                if not self.begun:
                    self.experiment.define_metric("validation/state_updates")
                    self.experiment.define_metric(f"{self.AGAINST}/{score}", step_metric="validation/state_updates")
                    self.begun = True
        super().log_metrics(metrics, step)


def page_options(run: RunConfig) -> dict[str, Any]:
    """What makes a run's wandb page: its identity, so that a resumed run continues it. In a run that wandb's agent
    has started (`wandb sweep`), wandb takes the page that the agent has chosen instead.

    Offline, without a question, where there is no key or no server; `wandb sync` takes it online later.

    Raises:
        ConfigError: wandb is not installed.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # a sweep has a thousand of them
    try:
        import wandb  # here, for it is slow to import and seldom wanted
    except ModuleNotFoundError:
        raise ConfigError("logger=wandb needs wandb: pip install 'skiprnn[wandb]'") from None

    name = run.data["name"]
    options = {
        "name": run.name,
        "id": run.hash,
        "resume": "allow",
        "group": f"{run.experiment or name}/{run.row}",
        "job_type": "train",
        "tags": [name, run.model.cell, run.model.policy, f"profile {run.profile.get('name')}"],
        "config": run.identity | {"lambda": run.model.cost_per_sample, "p_skip": run.model.p_skip},
        "settings": wandb.Settings(console="off"),
    }
    if "WANDB_MODE" not in os.environ:
        try:
            online = wandb.login(prompt=False)
        except wandb.errors.CommError as error:
            print(f"wandb: {str(error).splitlines()[0]}; logging offline", file=sys.stderr)
            online = False
        options["mode"] = "online" if online else "offline"
    return options


def summarise(loggers: Sequence[Logger], record: dict[str, Any], folder: RunFolder) -> None:
    """Give the wandb page its summary, the test results of the epoch that is best on validation, and its weights."""
    best = record["best"]
    results = {f"test/{key}": value for key, value in best["test"].items()}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(
                results | {"best_epoch": best["epoch"], "parameters": record["parameters"]}
            )
            import wandb  # it is there: the page is

            weights = wandb.Artifact(f"{folder.run.row}-{folder.run.hash}", "model", metadata=folder.run.identity)
            weights.add_file(str(folder.best))
            logger.experiment.log_artifact(weights)


def close_page(complete: bool) -> None:
    """End the wandb page of this process, if there is one: a sweep's next run has a page of its own."""
    wandb = sys.modules.get("wandb")
    if wandb and wandb.run:
        wandb.finish(exit_code=0 if complete else 1)

"""A run, watched from outside while it goes: which samples it uses, as a picture, and its page on wandb."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger

from skiprnn.config import RunConfig
from skiprnn.runs import RunFolder, write_atomically

USED, SKIPPED = np.array([215, 48, 39]), np.array([69, 117, 180])  # red and blue, as in the paper's figure 3
EXAMPLES = 8  # in a picture


def usage(
    inputs: np.ndarray, updates: np.ndarray, lengths: np.ndarray | None = None, image: tuple[int, int] | None = None
) -> np.ndarray:
    """Used samples red, skipped ones blue, white after a sequence's end: (height, width, 3) uint8.

    Images lie side by side, their ink bright; other sequences are bars, one below the other.

    Args:
        inputs: (B, T, I); drawn for images alone, their values from 0 to 1.
        updates: (B, T) of a step policy, or (B, T, H) of a neuron policy: then shades, by the share of neurons.
        lengths: (B,) valid steps; None: all T.
        image: rows and columns, if the T steps are an image's pixels.
    """
    share = (updates if updates.ndim == 2 else updates.mean(-1))[..., None]
    count, steps, _ = share.shape
    colours = share * USED + (1 - share) * SKIPPED
    if image:
        colours = colours * (0.35 + 0.65 * inputs)
    if lengths is not None:
        colours[np.arange(steps) >= lengths[:, None]] = 255
    rows, columns = image or (1, steps)
    tiles = [np.pad(tile.reshape(rows, columns, 3), ((0, 1), (0, 1), (0, 0)), constant_values=255) for tile in colours]
    scale = max(1, 900 // (columns * (count if image else 1)))
    picture = np.concatenate(tiles, 1 if image else 0).repeat(scale if image else 8, 0).repeat(scale, 1)
    return picture.round().astype(np.uint8)


class UsagePictures(lightning.Callback):
    """usage.png of the first validation examples, ten times in a run; a wandb page keeps all of them.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.every = folder, max(1, folder.run.training.epochs // 10)

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch = trainer.current_epoch
        if (epoch + 1) % self.every and epoch + 1 < trainer.max_epochs:
            return
        inputs, _, lengths = next(iter(module.data.evaluation_batches("validation")))
        inputs, lengths = inputs[:EXAMPLES], None if lengths is None else lengths[:EXAMPLES]
        module.network.eval()
        with torch.no_grad():
            _, updates = module.network(inputs, lengths)
        module.network.train()
        ends = None if lengths is None else lengths.cpu().numpy()
        picture = Image.fromarray(usage(inputs.cpu().numpy(), updates.cpu().numpy(), ends, module.data.image))
        file = io.BytesIO()
        picture.save(file, "PNG")
        write_atomically(self.folder.path / "usage.png", file.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("usage", [picture], step=epoch, caption=["used samples red, skipped ones blue"])


def page_options(run: RunConfig) -> dict[str, Any]:
    """What makes a run's wandb page: the run's identity, so that a resumed run continues it.

    Offline, without a question, where there is no key or no server; `wandb sync` takes it online later.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # a sweep has a thousand of them
    import wandb  # here, for it is slow to import and seldom wanted

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


def summarise(loggers: Sequence[Logger], record: dict[str, Any]) -> None:
    """Give the wandb page its summary: the test results of the epoch that is best on validation, as in the tables."""
    best = record["best"]
    results = {f"test/{key}": value for key, value in best["test"].items()}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(
                results | {"best_epoch": best["epoch"], "parameters": record["parameters"]}
            )


def close_page(complete: bool) -> None:
    """End the wandb page of this process, if there is one: a sweep's next run has a page of its own."""
    wandb = sys.modules.get("wandb")
    if wandb and wandb.run:
        wandb.finish(exit_code=0 if complete else 1)

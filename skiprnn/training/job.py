"""What trains runs: loggers, trainer, resumption; from the run folders to the records."""

import inspect
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment

from skiprnn.data.base import DataError
from skiprnn.training import provenance, setup, wandb_page
from skiprnn.training.config import ConfigError, DivergedError, RunConfig
from skiprnn.training.folder import RunFolder, StorageError, load_weights
from skiprnn.training.keeper import MetricsFile, RunKeeper
from skiprnn.training.module import SequenceModule, SideBySide, evaluate

# one line says it all; everything else keeps its traceback
USER_ERRORS = (ConfigError, DataError, DivergedError, StorageError)
OWN_LOGGER = {"_target_": f"{MetricsFile.__module__}.{MetricsFile.__name__}"}
INTERRUPTED = "interrupted: the same command continues"

Draw = Callable[[SequenceModule], Any]  # a matplotlib figure


def quieten() -> None:
    """Lightning's remarks on its own set-up say nothing to our users."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for remark in ("The `srun` command is available", "`isinstance\\(treespec, LeafSpec\\)` is deprecated"):
        warnings.filterwarnings("ignore", remark)  # which point at no module of theirs
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # the first step


def train(runs: Sequence[RunConfig], draw: Draw | None = None) -> list[dict[str, Any]]:
    """Train runs side by side to their end, each from where it stopped if it was begun before; returns their records.

    Args:
        runs: one, or several of the same data and protocol. Those that lag behind first catch up.
        draw: the picture of what a network uses that is kept in the run folder; None: no picture.

    Raises:
        ConfigError, DataError: something is missing or does not fit.
        DivergedError: runs whose loss became nan or infinite, after all others were trained to their end.
        StorageError: a file cannot be written.
        KeyboardInterrupt: the user stopped it.
        A run that fails says why in its failed.json.
    """
    setup.device_of(runs[0])
    loggers_of(runs[0])
    if any((run.data, run.training) != (runs[0].data, runs[0].training) for run in runs):
        raise ConfigError("runs side by side must agree in data and training")
    folders = [RunFolder(run) for run in runs]
    left = [folder for folder in folders if not folder.complete]
    # what cannot work is refused before anything is written
    made = {folder.run.name: setup.make_module(folder.run) for folder in left if not folder.path.exists()}
    diverged = []
    with ExitStack() as locks:
        for folder in left:
            locks.callback(folder.open().release)
        while left:
            try:
                _advance(left, draw, made)
            except DivergedError as error:
                (failed,) = (folder for folder in left if folder.run == error.run)
                failed.fail(error)
                left.remove(failed)
                diverged.append(str(error))
            except USER_ERRORS as error:
                for folder in left:
                    folder.fail(error)
                raise
            left = [folder for folder in left if not folder.complete]
    if diverged:
        raise DivergedError("; ".join(diverged))
    return [folder.record() for folder in folders]


def _advance(folders: Sequence[RunFolder], draw: Draw | None, made: dict[str, SequenceModule]) -> None:
    """Train the runs that lag behind as far as the next one is, or else all to the end and write their records.

    Args:
        made: modules, by the names of their runs, that are there and not begun; they are taken out.
    """
    checkpoints = [folder.checkpoint(folder.last) if folder.last.exists() else None for folder in folders]
    done = [progress_of(checkpoint) for checkpoint in checkpoints]
    behind = [(f, c) for f, c, one in zip(folders, checkpoints, done, strict=True) if one == min(done)]
    epochs = folders[0].run.training.epochs
    until = min((epoch + (batches > 0) for epoch, batches in done if (epoch, batches) > min(done)), default=epochs)
    keepers: list[RunKeeper] = []
    callbacks: list[lightning.Callback] = []
    try:
        for folder, checkpoint in behind:
            module = made.pop(folder.run.name, None) or setup.make_module(folder.run)
            keeper = RunKeeper(folder, module, make_loggers(folder), quiet=on_terminal(), pack=len(behind))
            keepers.append(keeper)
            callbacks += [wandb_page.UsagePictures(folder, module, keeper.loggers, draw)] if draw else []
            callbacks.append(keeper)
            if checkpoint:
                restore(keeper, checkpoint)
        modules = [keeper.module for keeper in keepers]
        trainer = make_trainer(folders[0].run, modules[0].device, until, callbacks)
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.processed = progress.completed = min(done)[0]
        fit(trainer, SideBySide(modules))
        if until == epochs:
            for keeper in keepers:
                record = make_record(keeper)
                wandb_page.summarise(keeper.loggers, record, keeper.folder)
                keeper.folder.finish(record)
    finally:
        complete = all(keeper.folder.complete for keeper in keepers)
        for keeper in keepers:
            for logger in keeper.loggers:
                logger.finalize("success" if complete else "failed")
        wandb_page.close_page(complete)


def progress_of(checkpoint: dict[str, Any] | None) -> tuple[int, int]:
    """Epochs, and batches of the next one, that a last.ckpt holds."""
    if checkpoint is None:
        return 0, 0
    return checkpoint["epoch"] + 1, checkpoint.get("within_epoch", {"batches": 0})["batches"]


def restore(keeper: RunKeeper, checkpoint: dict[str, Any]) -> None:
    """Let its run go on from its last checkpoint.

    Raises:
        ConfigError: what it holds does not fit.
    """
    load_weights(keeper.module, checkpoint, keeper.folder.last)
    try:
        (state,) = checkpoint["optimizer_states"]
        keeper.module.restore_optimiser(state)
        keeper.restore(checkpoint["callbacks"][RunKeeper.__name__], checkpoint.get("within_epoch"))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"checkpoint {keeper.folder.last} is damaged ({error}); delete it to begin anew") from None


def loggers_of(run: RunConfig) -> dict[str, Callable[..., Logger]]:
    """What makes the loggers of the run's config, by their names.

    Raises:
        ConfigError: there is no such logger, or its library is not installed.
    """
    loggers: dict[str, Callable[..., Logger]] = {}
    for name, settings in run.logger.items():
        if settings == OWN_LOGGER:
            loggers[name] = MetricsFile
            continue
        from hydra.errors import HydraException  # where only metrics.csv is kept, nothing needs Hydra
        from hydra.utils import instantiate

        try:
            loggers[name] = instantiate(settings | {"_partial_": True})
            if not callable(loggers[name]):
                raise TypeError("it has no _target_")
            inspect.signature(loggers[name])
        except (TypeError, ValueError, HydraException) as error:
            raise ConfigError(f"logger.{name}={settings}: {str(error).splitlines()[0]}") from None
    return loggers


def make_loggers(folder: RunFolder) -> list[Logger]:
    """The loggers of the run's config, in its folder."""
    page = wandb_page.page_options(folder.run) if "wandb" in folder.run.logger else {}
    return [
        make(save_dir=str(folder.path), **(page if name == "wandb" else {}))
        for name, make in loggers_of(folder.run).items()
    ]


def on_terminal() -> bool:
    """Whether progress is drawn, rather than a line now and then."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def has_bar() -> bool:
    """Whether this process draws it: of a sweep's processes, the one that started the others draws it for all."""
    return on_terminal() and multiprocessing.current_process().name == "MainProcess"


def make_trainer(
    run: RunConfig, device: torch.device, epochs: int, callbacks: Sequence[lightning.Callback]
) -> lightning.Trainer:
    """Lightning's trainer, by the run's protocol, up to an epoch."""
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        max_epochs=epochs,
        limit_train_batches=run.training.train_batches or 1.0,
        limit_val_batches=run.training.evaluation_batches or 1.0,
        logger=False,
        callbacks=[*callbacks, *([RichProgressBar(leave=False)] if has_bar() else [])],
        plugins=[LightningEnvironment()],  # a SLURM job's requeueing is its launcher's
        enable_checkpointing=False,
        enable_progress_bar=has_bar(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def fit(trainer: lightning.Trainer, runs: SideBySide) -> None:
    """Train.

    Raises:
        KeyboardInterrupt: the user stopped it, which Lightning answers by leaving the program.
    """
    try:
        trainer.fit(runs)
    except SystemExit:
        raise KeyboardInterrupt from None
    for run in runs.runs:  # Lightning has left the GPU
        run.to(run.device)


def make_record(keeper: RunKeeper) -> dict[str, Any]:
    """Results of the final and of the best-validation epoch, and where they come from.

    Raises:
        ConfigError: best.ckpt is not of the best epoch, or unusable.
    """
    folder, module, data = keeper.folder, keeper.module.eval(), keeper.module.data
    assert keeper.final is not None
    assert keeper.best is not None
    batches = folder.run.training.evaluation_batches
    final = best = keeper.final | {"test": evaluate(module, "test", batches)}
    if keeper.best["epoch"] != keeper.final["epoch"]:
        checkpoint = folder.checkpoint(folder.best)
        if checkpoint["epoch"] != keeper.best["epoch"]:
            raise ConfigError(f"checkpoint {folder.best} is not of the best epoch; delete {folder.path} to begin anew")
        load_weights(module, checkpoint, folder.best)
        best = keeper.best | {"test": evaluate(module, "test", batches)}
    return {
        "task": data.task,
        "final": final,
        "best": best,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "examples": data.examples,
        "steps": data.steps,
        "solved_at": data.solved_at,
        "input_flops": data.input_flops,
        "note": data.note,
        "seconds": keeper.seconds,
        "examples_per_second": keeper.trained["examples"] / keeper.trained["seconds"],
        "completed": datetime.now(UTC).isoformat(timespec="seconds"),
        "commits": keeper.commits,
        "places": keeper.places,
    } | provenance.describe(module.device, module.engine, keeper.pack)

"""Train one run, or sweep over many.

    python -m skiprnn.train model=skip_lstm model.cost_per_sample=1e-4
    python -m skiprnn.train -m model=skip_lstm,skip_gru seed=0,1,2,3
    python -m skiprnn.train -m experiment=table1 data=mnist profile=mnist/cpu

The only place that instantiates from a config. See conf/README.md.
"""

import logging
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment

from skiprnn.data.base import DataError, SequenceData
from skiprnn.training import config as configs
from skiprnn.training import measures as metrics
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import (
    AtomicCheckpointIO,
    RunFolder,
    RunKeeper,
    code_version,
    load_weights,
    provenance,
    read_checkpoint,
)
from skiprnn.training.module import DivergedError, SequenceModule
from skiprnn.training.pack import PackCheckpointIO, PackedModule, PackKeeper, RunDivergedError
from skiprnn.views import wandb_page as watch

USER_ERRORS = (ConfigError, DataError, DivergedError)  # one line says it all; everything else keeps its traceback
INTERRUPTED = "interrupted: the same command continues"


def device_of(run: RunConfig) -> torch.device:
    """The device that `device` stands for.

    Raises:
        ConfigError: cuda without a GPU.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    if run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    worker = re.search(r"\d+$", multiprocessing.current_process().name)  # a sweep's processes take turns over the GPUs
    return torch.device("cuda", int(worker[0]) % torch.cuda.device_count() if worker else 0)


def prepare_process(run: RunConfig) -> None:
    """Threads, and numbers too small to be normal as 0: over hundreds of steps gradients fade into them, and they are
    slow beyond measure on a CPU."""
    code_version()  # asked before the run, not after it
    torch.set_flush_denormal(True)
    if run.threads:
        torch.set_num_threads(run.threads)


def make_data(run: RunConfig) -> SequenceData:
    """The data set of a run, not yet loaded.

    Raises:
        ConfigError: an argument that the data class does not have, or that cannot work.
    """
    arguments = {key: value for key, value in run.data.items() if key not in ("_target_", "name")}
    try:
        data_class = get_class(run.data["_target_"])
        return data_class(**arguments, batch_size=run.training.batch_size, seed=run.seed, root=run.data_root)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data={run.data['name']}: {error}") from None


def make_module(run: RunConfig, device: torch.device) -> SequenceModule:
    """The run's data in memory, and the module that trains on it.

    Raises:
        ConfigError: a batch larger than the data, or an engine that does not serve the model.
    """
    data = make_data(run)
    data.prepare()
    data.load(device)
    module = SequenceModule(run, data)
    try:
        data.training_batches(0)
        engine_of(module, device)
    except ValueError as error:
        raise ConfigError(f"{run.row} on {run.data['name']}: {error}") from None
    return module


def engine_of(module: SequenceModule, device: torch.device) -> str:
    """The engine that runs the module's time loop."""
    rnn = module.network.rnn
    return rnn.engine_for(torch.empty(1, 1, rnn.input_size, device=device))


def make_loggers(run: RunConfig, folder: RunFolder) -> list[Logger]:
    """The loggers of the run's config, in its folder."""
    page = watch.page_options(run) if "wandb" in run.logger else {}
    return [
        instantiate(logger, _partial_=True)(save_dir=str(folder.path), **(page if name == "wandb" else {}))
        for name, logger in run.logger.items()
    ]


def make_trainer(run: RunConfig, folder: RunFolder, device: torch.device) -> tuple[lightning.Trainer, RunKeeper]:
    """Lightning's trainer, set up for the run folder."""
    keeper = RunKeeper(folder, quiet=not has_bar())
    callbacks = [watch.UsagePictures(folder), keeper]
    return lightning_trainer(run, folder, device, callbacks, AtomicCheckpointIO(), make_loggers(run, folder)), keeper


def has_bar() -> bool:
    """Whether progress is a bar on a terminal, rather than a line now and then."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def lightning_trainer(
    run: RunConfig, folder: RunFolder, device: torch.device, callbacks, checkpoints, loggers, epochs: int | None = None
) -> lightning.Trainer:
    """Lightning's trainer, by the run's protocol, or up to an earlier epoch."""
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        max_epochs=epochs or run.training.epochs,
        gradient_clip_val=run.training.gradient_clip,
        limit_train_batches=run.training.train_batches or 1.0,
        limit_val_batches=run.training.evaluation_batches or 1.0,
        limit_test_batches=run.training.evaluation_batches or 1.0,
        logger=loggers,
        callbacks=[*callbacks, *([RichProgressBar(leave=False)] if has_bar() else [])],
        plugins=[checkpoints, LightningEnvironment()],  # a SLURM job's requeueing is its launcher's
        default_root_dir=str(folder.path),
        enable_checkpointing=False,
        enable_progress_bar=has_bar(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def train(run: RunConfig) -> dict[str, Any]:
    """Train a run to its end, from where it stopped if it was begun before; returns its record.

    Raises:
        ConfigError, DataError: something is missing or does not fit.
        DivergedError: the loss became nan or infinite; the run folder says so in failed.json.
    """
    folder = RunFolder(run)
    if folder.complete:
        return folder.record()
    device = device_of(run)
    prepare_process(run)
    lock = folder.open()
    try:
        module = make_module(run, device)
        trainer, keeper = make_trainer(run, folder, device)
        resume = folder.last.exists()
        if resume:
            load_weights(module, read_checkpoint(folder.last), folder.last)  # for its clear errors
        fit(trainer, module, folder.last if resume else None)
        record = make_record(run, folder, module, trainer, keeper)
        watch.summarise(trainer.loggers, record)
        folder.finish(record)
    except USER_ERRORS as error:
        folder.fail(error)
        raise
    finally:
        watch.close_page(folder.complete)
        lock.release()
    return folder.record()


def train_packed(runs: Sequence[RunConfig]) -> None:
    """Train several runs as one job, each as `train` would; the lagging ones first catch up. See skiprnn.training.pack.

    Raises:
        ConfigError, DataError: something is missing or does not fit.
        DivergedError: runs whose loss became nan or infinite, after all others were trained to their end.
    """
    left = [run for run in runs if not RunFolder(run).complete]
    diverged = []
    with ExitStack() as stack:
        for run in left:
            stack.callback(RunFolder(run).open().release)
        while left:
            done = [epochs_done(RunFolder(run)) for run in left]
            lagging = [run for run, epochs in zip(left, done, strict=True) if epochs == min(done)]
            until = min((epochs for epochs in done if epochs > min(done)), default=lagging[0].training.epochs)
            try:
                _train_pack(lagging, until)
                if until == lagging[0].training.epochs:
                    left = [run for run in left if not RunFolder(run).complete]
            except RunDivergedError as error:
                failed = lagging[error.index]
                RunFolder(failed).fail(error)
                diverged.append(f"{failed.name}: {error}")
                left.remove(failed)
            except USER_ERRORS as error:
                for run in left:
                    RunFolder(run).fail(error)
                raise
    if diverged:
        raise DivergedError("; ".join(diverged))


def epochs_done(folder: RunFolder) -> int:
    """Epochs in the last checkpoint."""
    return read_checkpoint(folder.last)["epoch"] + 1 if folder.last.exists() else 0


def _train_pack(runs: Sequence[RunConfig], until: int) -> None:
    """Train runs of equal progress in lockstep up to an epoch; write their records if it is the last."""
    first, folders = runs[0], [RunFolder(run) for run in runs]
    device = device_of(first)
    prepare_process(first)
    modules = [make_module(run, device) for run in runs]
    keepers = [RunKeeper(folder, quiet=not has_bar()) for folder in folders]
    loggers = [make_loggers(run, folder) for run, folder in zip(runs, folders, strict=True)]
    pictures = [watch.UsagePictures(folder) for folder in folders]
    keeper, checkpoints = PackKeeper(keepers, pictures, loggers), PackCheckpointIO(folders)
    trainer = lightning_trainer(first, folders[0], device, [keeper], checkpoints, False, until)
    resume = folders[0].last.exists()
    for module, folder in zip(modules, folders, strict=True):
        if resume:
            load_weights(module, read_checkpoint(folder.last), folder.last)  # for its clear errors
    fit(trainer, PackedModule(modules), folders[0].last if resume else None)
    if until < first.training.epochs:
        return
    for run, folder, module, one in zip(runs, folders, modules, keepers, strict=True):
        folder.finish(make_record(run, folder, module, trainer, one) | {"pack": len(runs)})


def fit(trainer, module, checkpoint: Path | None) -> None:
    """Train, from a checkpoint or from the start.

    Raises:
        KeyboardInterrupt: the user stopped it, which Lightning answers by leaving the program.
    """
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        raise KeyboardInterrupt from None


def make_record(run, folder, module, trainer, keeper) -> dict[str, Any]:
    """Results of the final and of the best-validation epoch, and where they come from."""
    rnn, data = module.network.rnn, module.data

    def tested(epoch: dict[str, Any]) -> dict[str, Any]:
        trainer.test(module, verbose=False)
        test = module.results("test")
        test["inference_flops"] = metrics.inference_flops(rnn, test["state_updates"], data.steps)
        return epoch | {"test": test}

    final = tested(keeper.final)
    best = final
    if keeper.best["epoch"] != keeper.final["epoch"]:
        load_weights(module, read_checkpoint(folder.best, module.device), folder.best)
        best = tested(keeper.best)
    return {
        "name": run.name,
        "hash": run.hash,
        "config": run.identity,
        "profile": run.profile,
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
    } | provenance(module.device, engine_of(module, module.device))


def seconds_per_epoch(run: RunConfig, batches: int = 2) -> float:
    """An estimate from a short measurement: training and validation steps on real batches, at the initial weights."""
    prepare_process(run)
    module = make_module(run, device_of(run)).to(device_of(run))
    optimizer = module.configure_optimizers()
    module.sums = {stage: metrics.EpochSums(module.data.task, module.device) for stage in ("train", "validation")}

    def timed(loader, limit: int | None, step) -> float:
        """Seconds for an epoch's pass over the loader."""
        loaded: Iterator = islice(iter(loader), batches + 1)
        step(next(loaded))  # warm-up
        start, done = time.perf_counter(), 0
        for batch in loaded:
            step(batch)
            done += 1
        return (time.perf_counter() - start) / max(done, 1) * min(len(loader), limit or len(loader))

    def training_step(batch) -> None:
        optimizer.zero_grad()
        module.network.rnn.policy.set_epoch(0)
        inputs, targets, lengths = batch
        prediction, updates = module.network(inputs, lengths)
        (metrics.task_loss(module.data.task, prediction, targets).mean() + 0 * updates.sum()).backward()
        optimizer.step()
        module.sums["train"].sums.sum().item()  # waits for the device

    def validation_step(batch) -> None:
        with torch.no_grad():
            module.network(batch[0], batch[2])

    limits = run.training
    return timed(module.data.training_batches(0), limits.train_batches, training_step) + timed(
        module.data.evaluation_batches("validation"), limits.evaluation_batches, validation_step
    )


def quieten() -> None:
    """Lightning's remarks on its own set-up say nothing to our users."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


@hydra.main(version_base="1.3", config_path=str(configs.packaged("conf")), config_name="config")
def main(config: DictConfig) -> dict[str, Any] | None:
    quieten()
    try:
        run = configs.read(config)
        if run.experiment and HydraConfig.get().mode == RunMode.RUN:
            raise ConfigError(f"experiment={run.experiment} is many runs: add -m")
        if (run.pack or 1) > 1:
            train_packed([replace(run, seed=seed) for seed in config["seeds"]])
            return None
        record = train(run)
    except USER_ERRORS as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # the sweep goes on, and reports it at the end
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(INTERRUPTED)
    key = metrics.SCORES["regression" if "mse" in record["best"]["test"] else "classification"]
    best = record["best"]
    print(f"{run.name}: test {key} {best['test'][key]:.4f}, state updates {best['test']['state_updates']:.1f}", end=" ")
    print(f"(epoch {best['epoch'] + 1}, best on validation)  {RunFolder(run).path}")
    return None


if __name__ == "__main__":
    main()

"""How long an epoch will take."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from skiprnn.data.base import Batch, Batches
from skiprnn.training.config import RunConfig
from skiprnn.training.job import make_module
from skiprnn.training.module import SideBySide


def seconds_per_epoch(run: RunConfig, batches: int = 2) -> float:
    """An estimate from a short measurement: training and validation steps on real batches, at the initial weights."""
    runs = SideBySide([make_module(run)])
    (module,) = runs.runs
    module.begin("validation")
    module.begin("train", 0)

    def timed(loader: Batches, limit: int | None, stage: str, step: Callable[[list[Batch]], object]) -> float:
        """Seconds for an epoch's pass over the loader."""
        loaded: Iterator[Batch] = islice(iter(loader), batches + 1)
        step([next(loaded)])  # warm-up
        start, done = time.perf_counter(), 0
        for batch in loaded:
            step([batch])
            module.sums[stage].sums.tolist()  # waits for the device
            done += 1
        return (time.perf_counter() - start) / max(done, 1) * min(len(loader), limit or len(loader))

    limits = run.training
    seconds = timed(module.data.training_batches(0), limits.train_batches, "train", runs.training_step)
    with torch.no_grad():
        loader = module.data.evaluation_batches("validation")
        return seconds + timed(loader, limits.evaluation_batches, "validation", runs.validation_step)

"""How long a step and an epoch will take, from a few of them on real batches, at the initial weights."""

import time
from collections.abc import Sequence
from itertools import cycle, islice

from skiprnn.data.base import Batches
from skiprnn.training.config import RunConfig
from skiprnn.training.module import SequenceModule, SideBySide
from skiprnn.training.setup import make_module

WARM_UP = {"cuda": 2}  # steps that do not count: there the second one records a graph; elsewhere one


def batches_of(module: SequenceModule, stage: str) -> Batches:
    return module.data.training_batches(0) if stage == "train" else module.data.evaluation_batches(stage)


def seconds_per_step(runs: Sequence[SequenceModule], stage: str, steps: int) -> float:
    """Of runs side by side, to train or to validate them, its batches made as well; the mean of some steps."""
    together = SideBySide(runs)
    step = together.training_step if stage == "train" else together.validation_step
    for run in runs:
        run.begin(stage, 0 if stage == "train" else None)
    batches = zip(*(cycle(batches_of(run, stage)) for run in runs), strict=True)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for some in islice(batches, count):
            step(some)
        runs[-1].sums[stage].sums.tolist()  # waits for the device
        return time.perf_counter() - start

    seconds(WARM_UP.get(runs[0].device.type, 1))
    return seconds(steps) / steps


def seconds_per_epoch(*runs: RunConfig, steps: int = 2) -> float:
    """Of runs side by side: training and validation."""
    modules, training = [make_module(run) for run in runs], runs[0].training
    limits = {"train": training.train_batches, "validation": training.evaluation_batches}
    counts = {stage: len(batches_of(modules[0], stage)) for stage in limits}
    return sum(
        seconds_per_step(modules, stage, steps) * min(counts[stage], limit or counts[stage])
        for stage, limit in limits.items()
    )

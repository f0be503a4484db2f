"""Frequency discrimination: is the period of a sampled sine wave between 5 and 6 ms? ([SKIP] section 4.2)"""

import math

import torch

from skiprnn.data.base import Batch, GeneratedData


class FrequencyDiscrimination(GeneratedData):
    """Sine waves of random phase, one value per step; class 0: a period in the target interval, class 1: any other.

    Every batch is stratified: its first half is of class 0, its second half (the larger, if B is odd) of class 1.

    Args:
        sampling_period: ms from step to step; the paper has 1 and 0.5, which make T = 100 and 200.
        duration: of the signal, ms.
        target_low, target_high: class 0 draws its period from U(target_low, target_high) ms.
        low, high: class 1 draws uniformly from (low, target_low) and (target_high, high) ms together. The paper
            states low = 1; the authors' script has 0.
        phase: the shift is drawn from U(0, period) and taken as "time", in ms, so that every phase is as likely; or as
            "radians", which is what the authors' script does.
        batches_per_epoch, validation_batches, test_batches: see GeneratedData. The authors evaluate every 300
            iterations on 15 batches.
        batch_size, seed, root: see SequenceData. Nothing is stored under root.

    Raises:
        ValueError: an argument out of its range.
    """

    input_size, outputs, task, solved_at = 1, 2, "classification", 0.99

    def __init__(
        self,
        sampling_period: float = 1.0,
        duration: float = 100.0,
        target_low: float = 5.0,
        target_high: float = 6.0,
        low: float = 1.0,
        high: float = 100.0,
        phase: str = "time",
        batches_per_epoch: int = 300,
        validation_batches: int = 15,
        test_batches: int = 15,
        batch_size: int = 256,
        seed: int = 0,
        root: str = "data",
    ):
        super().__init__(batches_per_epoch, validation_batches, test_batches, batch_size, seed, root)
        if not 0 < sampling_period <= duration:
            raise ValueError(f"sampling_period must be in (0, duration]; got {sampling_period} of {duration} ms")
        if not 0 <= low <= target_low < target_high <= high:
            raise ValueError(
                "periods must satisfy 0 <= low <= target_low < target_high <= high; "
                f"got {low}, {target_low}, {target_high}, {high}"
            )
        if low == target_low and target_high == high:
            raise ValueError("low and high must leave class 1 a period outside the target interval")
        if phase not in ("time", "radians"):
            raise ValueError(f'phase must be "time" or "radians"; got {phase!r}')
        self.steps = int(duration / sampling_period)
        self.sampling_period, self.phase = sampling_period, phase
        self.target, self.range = (target_low, target_high), (low, high)

    def draw(self, generator: torch.Generator) -> Batch:
        targets = torch.ones(self.batch_size, dtype=torch.int64)
        targets[: self.batch_size // 2] = 0
        period = self.periods(targets, generator)
        shift = period * torch.rand(self.batch_size, generator=generator, dtype=torch.float64)
        time = torch.arange(self.steps, dtype=torch.float64) * self.sampling_period
        if self.phase == "time":
            shift = 2 * math.pi * shift / period
        angle = 2 * math.pi * time / period.unsqueeze(1) + shift.unsqueeze(1)
        return torch.cos(angle).float().unsqueeze(2), targets, None

    def periods(self, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random period for each class in targets (B,): (B,) float64, in ms."""
        (low, high), (target_low, target_high) = self.range, self.target
        uniform = torch.rand(len(targets), generator=generator, dtype=torch.float64)
        gap = target_high - target_low
        other = high - gap - uniform * (high - gap - low)  # from the top, for the period 0 must not come out
        other = torch.where(other > target_low, other + gap, other)
        return torch.where(targets == 0, target_low + uniform * gap, other)

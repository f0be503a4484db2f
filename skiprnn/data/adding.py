"""The adding task: sum the two marked values of a sequence ([SKIP] section 4.1, [SA] section 4)."""

import torch
from torch import Tensor

from skiprnn.data.base import Batch, GeneratedData


class Adding(GeneratedData):
    """Sequences of (value, marker); the target is the sum of the two values whose marker is 1.

    Args:
        length: T.
        low, high: values are drawn from U(low, high).
        markers: "halves": one marker in the first 10 % of the steps, one in the last 50 % (Skip RNN);
            "anywhere": two different steps, all pairs alike (SA-RNN).
        batches_per_epoch, validation_batches, test_batches: see GeneratedData. The Skip RNN authors evaluate every
            300 iterations on 15 batches.
        batch_size, seed, root: see SequenceData. Nothing is stored under root.

    Attributes:
        target_variance: of the target, (high - low)^2 / 6: the error of the best constant answer.
        solved_at: an error 100 times smaller.

    Raises:
        ValueError: an argument out of its range.
    """

    input_size, outputs, task = 2, 1, "regression"

    def __init__(
        self,
        length: int = 50,
        low: float = -0.5,
        high: float = 0.5,
        markers: str = "halves",
        batches_per_epoch: int = 300,
        validation_batches: int = 15,
        test_batches: int = 15,
        batch_size: int = 256,
        seed: int = 0,
        root: str = "data",
    ):
        super().__init__(batches_per_epoch, validation_batches, test_batches, batch_size, seed, root)
        if length < 2:
            raise ValueError(f"length must be at least 2, one step per marker; got {length}")
        if not low < high:
            raise ValueError(f"low must be below high; got {low} and {high}")
        if markers not in ("halves", "anywhere"):
            raise ValueError(f'markers must be "halves" or "anywhere"; got {markers!r}')
        self.steps, self.low, self.high, self.markers = length, low, high, markers
        self.target_variance = 2 * (high - low) ** 2 / 12
        self.solved_at = self.target_variance / 100

    def draw(self, generator: torch.Generator) -> Batch:
        values = torch.empty(self.batch_size, self.steps).uniform_(self.low, self.high, generator=generator)
        marked = torch.stack(self._marked(generator), dim=1)
        inputs = torch.stack([values, torch.zeros_like(values).scatter_(1, marked, 1.0)], dim=2)
        return inputs, values.gather(1, marked).sum(1), None

    def _marked(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The two marked steps of every sequence, (B,) int64 each, never the same."""
        if self.markers == "halves":
            first = torch.randint(max(1, self.steps // 10), (self.batch_size,), generator=generator)
            second = torch.randint(self.steps // 2, self.steps, (self.batch_size,), generator=generator)
            return first, second
        first = torch.randint(self.steps, (self.batch_size,), generator=generator)
        second = torch.randint(self.steps - 1, (self.batch_size,), generator=generator)
        return first, second + (second >= first)  # skip over the first marker's step

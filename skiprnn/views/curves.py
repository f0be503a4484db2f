"""Metrics per epoch of a row's runs, side by side.

Shapes: R runs, E epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skiprnn.papers.records import SECONDS


@dataclass(frozen=True)
class Curves:
    """What metrics.csv says of several runs; nan where a run has no such epoch, or column."""

    columns: dict[str, np.ndarray]  # (R, E) each; the first epoch is that after the first pass over the data

    @classmethod
    def of(cls, runs: Sequence[dict[str, list[float]]]) -> "Curves":
        """From skiprnn.papers.records.read_curves."""
        names = dict.fromkeys(name for run in runs for name in run if name != "epoch")
        epochs = int(max((max(run["epoch"], default=-1) for run in runs), default=-1)) + 1
        columns = {name: np.full((len(runs), epochs), np.nan) for name in names}
        for number, run in enumerate(runs):
            there = np.array(run["epoch"], dtype=int)
            for name, values in run.items():
                if name != "epoch":
                    columns[name][number, there] = values
        return cls(columns)

    def __getitem__(self, metric: str) -> np.ndarray:
        """A metric (R, E); without runs or column (0, 0)."""
        return self.columns.get(metric, np.empty((0, 0)))

    @property
    def epochs(self) -> np.ndarray:
        """From 1 (E,)."""
        return 1 + np.arange(next(iter(self.columns.values()), np.empty((0, 0))).shape[1])

    def seconds(self, clock: str) -> np.ndarray:
        """Until the end of each epoch (E,), training and validation, mean over the runs.

        Args:
            clock: one of SECONDS.
        """
        return spread(self[clock].cumsum(1))[0]


def clock(rows: Sequence[Curves]) -> str | None:
    """The one of SECONDS that all runs of all rows have; None: there is none."""

    def in_all(values: np.ndarray) -> bool:
        return bool(values.size and np.isfinite(values).any(1).all())

    return next((name for name in SECONDS if all(in_all(row[name]) for row in rows)), None)


def spread(values: np.ndarray) -> np.ndarray:
    """Mean, least and largest over the runs that have the epoch, (3, E), of (R, E); nan where none has."""
    if not values.size:
        return np.full((3, values.shape[1]), np.nan)
    there = np.isfinite(values)
    count = there.sum(0)
    mean = np.where(there, values, 0).sum(0) / np.where(count, count, np.nan)
    ends = np.where(there, values, np.inf).min(0), np.where(there, values, -np.inf).max(0)
    return np.stack([mean, *(np.where(count, end, np.nan) for end in ends)])

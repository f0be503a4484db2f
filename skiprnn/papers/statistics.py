"""Results -> means, intervals, verdicts.

A verdict says what a row's runs show of the difference to the published mean. Whether it is smaller than a margin is
tested by two one-sided tests, whether it is there by Welch's test, both at 5 %, the latter by Holm over a table's rows:

                                 no difference shown    a difference shown
    90 % interval within margin  reproduced             close
    not within                   undecided              differs (higher), differs (lower)
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import t as student

from skiprnn.model.policies import POLICIES
from skiprnn.papers.experiments import LAST, METRICS, SOLVED, UPDATES, Experiment
from skiprnn.papers.plan import PlannedRun
from skiprnn.papers.records import Results, both_epochs, holds, results

LEVEL = 0.05  # of every test
LEAST_RUNS = 3  # that say anything of a spread
REPRODUCED, CLOSE, UNDECIDED = "reproduced", "close", "undecided"
FIXED = "fixed"  # in place of a verdict: by construction


class Sample(NamedTuple):
    """What is known of a mean."""

    mean: float
    std: float | None  # sample standard deviation; None: the mean is one draw of unknown spread
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Difference(NamedTuple):
    """A difference of two means, its standard error, and that one's degrees of freedom (Welch's)."""

    value: float
    error: float
    freedom: float

    def interval(self) -> tuple[float, float]:
        """The 90 % confidence interval: its ends are the 5 % bounds of one-sided tests."""
        half = float(student.ppf(1 - LEVEL, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p(self) -> float:
        """Of Welch's two-sided test that there is none."""
        if not self.error:
            return float(self.value == 0)
        return 2 * float(student.sf(abs(self.value) / self.error, self.freedom))


def difference(ours: Sample, theirs: Sample, times: float = 1.0) -> Difference:
    """`ours` - times · `theirs`. Where the latter's spread is unknown, it is taken for ours, and the mean for one draw.

    Args:
        ours: of at least two runs.
    """
    assert ours.std is not None
    value = ours.mean - times * theirs.mean
    if theirs.std is None:
        return Difference(value, ours.std * (1 / ours.runs + times**2) ** 0.5, ours.runs - 1)
    parts = [(ours.std**2 / ours.runs, ours.runs - 1), ((times * theirs.std) ** 2 / theirs.runs, theirs.runs - 1)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else 1.0
    return Difference(value, variance**0.5, freedom)


def holm(p: Sequence[float]) -> list[float]:
    """P-values of several tests, so corrected that the chance of any false finding is what one test has."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def verdict(change: Difference, margin: float, p: float) -> str:
    """As the head of this file has it.

    Args:
        change: to the published mean.
        margin: the difference that does not matter.
        p: of Welch's test, corrected over the table's rows.
    """
    low, high = change.interval()
    within, shown = -margin <= low and high <= margin, p < LEVEL
    if within:
        return CLOSE if shown else REPRODUCED
    return f"differs ({'higher' if change.value > 0 else 'lower'})" if shown else UNDECIDED


def solved_verdict(solved: Sequence[float], published: bool) -> str:
    """Of a task that is published as solved or not, which is said of a row as a whole."""
    if len(solved) < LEAST_RUNS or len(set(solved)) > 1:
        return UNDECIDED
    return REPRODUCED if solved[0] == published else f"differs ({'' if solved[0] else 'not '}solved)"


@dataclass
class Comparison:
    """A row's metric beside the published one."""

    verdict: str
    change: Difference | None = None
    margin: float | None = None
    p: float | None = None  # None: there is nothing to test

    def line(self, metric: str) -> dict[str, Any]:
        """As numbers of a table's row."""
        line: dict[str, Any] = {f"{metric}_verdict": self.verdict}
        if self.change:
            low, high = self.change.interval()
            line |= {f"{metric}_difference": self.change.value, f"{metric}_low": low, f"{metric}_high": high}
            line |= {f"{metric}_margin": self.margin, f"{metric}_p": self.p}
        return line


def compare(experiment: Experiment, metric: str, rows: Sequence[Results]) -> list[Comparison | None]:
    """A metric of each row beside the published one; None where none is published, or the metric is not compared."""
    compared = [_compare(experiment, metric, row) for row in rows]
    tested = [one for one in compared if one and one.p is not None]
    for one, p in zip(tested, holm([one.p for one in tested if one.p is not None]), strict=True):
        assert one.change is not None
        assert one.margin is not None
        one.p, one.verdict = p, verdict(one.change, one.margin, p)
    return compared


def _compare(experiment: Experiment, metric: str, row: Results) -> Comparison | None:
    """One row's, not yet corrected."""
    name = metric.removeprefix(LAST)
    (mean, std), values = row.row.paper(name), row.values(metric)
    if mean is None or not (name == SOLVED or name in experiment.margins):
        return None
    if name.startswith(UPDATES) and not POLICIES[row.policy].learned:
        return Comparison(FIXED)
    if other_data(experiment, row):
        ours = statistics.mean(values)
        return Comparison("other data" if ours == mean else f"{'higher' if ours > mean else 'lower'}, on other data")
    if name == SOLVED:
        return Comparison(solved_verdict(values, mean))
    if len(values) < 2:
        return Comparison(UNDECIDED)
    theirs = Sample(mean, std, experiment.published_runs or 1)
    change = difference(Sample.of(values), theirs)
    margin = max(experiment.margins[name] * (row.records[0]["steps"] if name == UPDATES else 1), 2 * (std or 0.0))
    enough = len(values) >= LEAST_RUNS and not row.diverged  # the mean of those that have not diverged flatters
    return Comparison(UNDECIDED, change, margin, change.p() if enough else None)


def other_data(experiment: Experiment, row: Results) -> bool:
    """Whether a run was of other data than the paper's, by what the experiment says of these."""
    return any(not holds(experiment.published_data, record) for record in row.records)


def rows(experiment: Experiment, planned: Sequence[PlannedRun]) -> pd.DataFrame:
    """One line per row, numbers as numbers: mean and sample standard deviation over the runs done, and the comparison
    with the published number."""
    ended = list(results(planned))
    lines: list[dict[str, Any]] = [{"model": row.row.label} for row in ended]
    for metric in both_epochs(experiment.columns):
        for row, line, comparison in zip(ended, lines, compare(experiment, metric, ended), strict=True):
            values = row.values(metric)
            ours = Sample.of(values) if values else Sample(float("nan"), None, 0)
            line |= {f"{metric}_mean": ours.mean, f"{metric}_std": None if METRICS[metric].share else ours.std}
            if not metric.startswith(LAST):  # it is published once
                mean, std = row.row.paper(metric)
                line |= {f"published_{metric}_mean": mean, f"published_{metric}_std": std}
            line |= comparison.line(metric) if comparison else {}
    for row, line in zip(ended, lines, strict=True):
        line |= {"runs_done": row.done, "runs_planned": row.planned, "runs_diverged": row.diverged}
    return pd.DataFrame(lines).dropna(axis="columns", how="all")

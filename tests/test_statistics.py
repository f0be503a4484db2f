"""Intervals and tests against scipy's and hand calculations; how often the verdicts err, by simulation."""

import itertools
import random
import statistics as stdlib

import pytest
from scipy import stats

from skiprnn.papers import experiments
from skiprnn.papers.statistics import Difference, Sample, difference, holm, solved_verdict, verdict


def test_difference_and_test_are_welchs():
    ours, theirs = [0.91, 0.94, 0.97], [0.955, 0.96, 0.97, 0.985]
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    change = difference(Sample.of(ours), Sample.of(theirs))
    assert change.interval() == pytest.approx(tuple(expected.confidence_interval(0.90)))
    assert change.p() == pytest.approx(expected.pvalue)
    twice = stats.ttest_ind(ours, [2 * value for value in theirs], equal_var=False)
    assert difference(Sample.of(ours), Sample.of(theirs), times=2).p() == pytest.approx(twice.pvalue)


def test_a_published_mean_without_a_deviation_is_one_draw_with_the_spread_of_ours():
    """By hand: standard error 3 · √(1/4 + 1), 3 degrees of freedom, where t is 2.3534."""
    change = difference(Sample(30.0, 3.0, 4), Sample(20.0, None, 4))
    assert change.interval() == pytest.approx((10 - 7.8935, 10 + 7.8935), abs=1e-3)
    ours = [27.0, 29.0, 31.0, 33.0]
    assert difference(Sample.of(ours), Sample(20.0, None, 4)).p() == pytest.approx(
        stats.ttest_ind(ours, [20.0]).pvalue  # pooled: the one draw says nothing of the spread
    )


def test_without_any_spread_a_difference_is_what_it_is():
    same, other = Sample(784.0, 0.0, 4), Sample(783.0, 0.0, 4)
    assert difference(same, same) == Difference(0.0, 0.0, 1.0)
    assert (difference(same, same).p(), difference(other, same).p()) == (1, 0)
    assert difference(other, same).interval() == (-1, -1)


def test_holm_by_hand():
    """The least p-value times the number of tests, the next times one fewer, none below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("value", "error", "margin", "correction", "expected"),
    [
        (0.001, 0.002, 0.01, 1, "reproduced"),
        (0.006, 0.001, 0.01, 1, "close"),
        (0.02, 0.002, 0.01, 1, "differs (higher)"),
        (-0.02, 0.002, 0.01, 1, "differs (lower)"),
        (0.009, 0.001, 0.01, 1, "differs (higher)"),  # it may be beyond the margin
        (0.005, 0.01, 0.01, 1, "undecided"),  # interval wider than the margin, and it holds 0
        (0.02, 0.0085, 0.01, 1, "differs (higher)"),  # t is 2.35 of 2.23
        (0.02, 0.0085, 0.01, 6, "undecided"),  # one of six rows
    ],
)
def test_verdicts(value, error, margin, correction, expected):
    change = Difference(value, error, 10)
    assert verdict(change, margin, min(1, correction * change.p())) == expected


@pytest.mark.parametrize(
    ("solved", "published", "expected"),
    [
        ([1, 1, 1], True, "reproduced"),
        ([0, 0, 0, 0], False, "reproduced"),
        ([1, 1, 1, 0], True, "undecided"),
        ([0, 0, 1], False, "undecided"),
        ([0, 0, 0], True, "differs (not solved)"),
        ([1, 1, 1], False, "differs (solved)"),
        ([1, 1], True, "undecided"),
        ([], True, "undecided"),
    ],
)
def test_a_task_is_solved_as_published_if_all_runs_say_so(solved, published, expected):
    assert solved_verdict(solved, published) == expected


def test_every_published_accuracy_and_learned_number_of_updates_is_compared():
    for experiment in experiments.published():
        given = {metric for row in experiment.rows for metric in row.published}
        assert set(experiment.margins) == given & {"accuracy", "mse", "state_updates", "state_updates_percent"}


# the published deviations of Table I's accuracies, and the smallest margin
SPREADS = {row.label: row.published["accuracy"][1] for row in experiments.load("table1").rows if row.published}
SMALLEST = experiments.load("table1").margins["accuracy"]


def simulate(shift, tables: int = 300, runs: int = 4) -> dict[str, list[str]]:
    """Verdicts of many tables like Table I, each row drawn from normal distributions with its published deviation, ours
    apart from the paper's by shift(margin, deviation)."""
    rng, found = random.Random(0), {label: [] for label in SPREADS}
    for _ in range(tables):
        changes, margins = [], []
        for spread in SPREADS.values():
            published = Sample.of([rng.gauss(0, spread) for _ in range(4)])
            margins.append(max(SMALLEST, 2 * published.std))
            ours = [shift(margins[-1], spread) + rng.gauss(0, spread) for _ in range(runs)]
            changes.append(difference(Sample.of(ours), published))
        corrected = holm([change.p() for change in changes])
        for label, *judged in zip(SPREADS, changes, margins, corrected, strict=True):
            found[label].append(verdict(*judged))
    return found


def share(verdicts: list[str], *wanted: str) -> float:
    return sum(one.startswith(wanted) for one in verdicts) / len(verdicts)


def test_where_there_is_no_difference_most_rows_are_reproduced_and_hardly_any_differs():
    found = simulate(lambda margin, spread: 0.0)
    every = list(itertools.chain(*found.values()))
    assert share(every, "reproduced") > 0.75
    assert min(share(verdicts, "reproduced") for verdicts in found.values()) > 0.4
    tables = zip(*found.values(), strict=True)
    assert stdlib.mean(any(one.startswith(("differs", "close")) for one in table) for table in tables) < 0.05


def test_a_difference_of_the_margin_is_hardly_ever_called_reproduced():
    found = simulate(lambda margin, spread: margin)
    assert share(list(itertools.chain(*found.values())), "reproduced", "close") < 0.05
    assert max(share(verdicts, "reproduced") for verdicts in found.values()) < 0.07  # 0.05, and chance among 300


def test_a_difference_of_three_deviations_differs_mostly():
    """Where two of them are the margin; below that, it is close or differs."""
    found = simulate(lambda margin, spread: 3 * spread)
    beyond = [label for label, spread in SPREADS.items() if 2 * spread > SMALLEST]
    assert len(beyond) == 2
    for label in beyond:
        assert share(found[label], "differs (higher)") > 0.6
        assert share(found[label], "reproduced", "differs (lower)") < 0.02

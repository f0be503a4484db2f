"""experiments/claims.yaml: what the papers claim -> tests on published records -> verdicts.

A test asserts that a statistic lies on one side of a bound. It holds if that is shown at 5 %, does not hold if the
contrary is, and is undecided otherwise; a row of fewer than three runs decides nothing. A claim holds if all its tests
do, and does not if one does not.
"""

import json
import math
import statistics as stdlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from scipy import stats

from skiprnn.papers import experiments
from skiprnn.papers.experiments import LAST, METRICS, SOLVED, Experiment, Row
from skiprnn.papers.records import SECONDS, Results, holds, read_curves, read_published, steps_per_epoch
from skiprnn.papers.statistics import LEAST_RUNS, LEVEL, UNDECIDED, Sample, difference, other_data
from skiprnn.papers.table import MISSING
from skiprnn.training.config import ConfigError

HOLDS, FAILS, TOO_FEW, UNTESTED = "holds", "does not hold", "too few runs", "not tested"


@dataclass(frozen=True)
class Evidence:
    """What is published of a row."""

    results: Results
    curves: list[pd.DataFrame]  # metrics per epoch, of the runs that have them; seconds only where these are its own

    def timed(self, unit: str) -> list[pd.DataFrame]:
        """The curves that tell the time in steps or seconds."""
        return [curve for curve in self.curves if unit == "steps" or any(name in curve for name in SECONDS)]

    def runs(self, test: dict[str, Any]) -> int:
        """How many a test can use."""
        match test["statistic"]:
            case "solved":
                return self.results.done
            case "time":
                return len(self.timed(test["in"])) + self.results.diverged
            case _:
                return len(self.results.records)


@dataclass(frozen=True)
class Outcome:
    """What a statistic came to, in words, and what follows."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Finding:
    """A test, what it tested, and its outcomes at the epoch with the best validation score, and at the last."""

    statement: str
    folder: str  # of results/
    runs: list[int]  # of each row, that ended
    protocols: list[str]  # what these runs' profiles say of themselves
    best: Outcome
    last: Outcome


@dataclass(frozen=True)
class Claim:
    """A claim and what the records say of it."""

    text: str
    source: str
    findings: list[Finding]

    @property
    def best(self) -> str:
        return _together([finding.best.verdict for finding in self.findings])

    @property
    def last(self) -> str:
        return _together([finding.last.verdict for finding in self.findings])


def _together(verdicts: Sequence[str]) -> str:
    """The first of these that one of them is."""
    return next((one for one in (FAILS, TOO_FEW, UNDECIDED, HOLDS) if one in verdicts), UNTESTED)


def decided(pro: bool, contra: bool) -> str:
    return HOLDS if pro else FAILS if contra else UNDECIDED


# statistics: (the test's settings, its rows, "" or "last_" for the epoch) -> outcome


def mean(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """A mean, or a difference of two, against a bound: a one-sided t-test (Welch's)."""
    metric = METRICS[test["metric"]]
    first, *second = [Sample.of(row.results.values(epoch + test["metric"])) for row in rows]
    change = difference(first, second[0] if second else Sample(0.0, 0.0, 2), test.get("times", 1))
    low, high = change.interval()
    number = f"{'+' if second else ''}.{metric.digits}f"  # a difference has its sign
    measured = f"{change.value:{number}} [{low:{number}}, {high:{number}}]"
    if "above" in test:
        return Outcome(measured, decided(low > test["above"], high < test["above"]))
    return Outcome(measured, decided(high < test["below"], low > test["below"]))


def spread(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """The standard deviation of one row below another's: a one-sided F-test of the variances."""
    first, second = (Sample.of(row.results.values(epoch + test["metric"])) for row in rows)
    assert first.std is not None
    assert second.std is not None
    digits = METRICS[test["metric"]].digits or 0
    measured = f"± {first.std:.{digits + 1}f} against ± {second.std:.{digits + 1}f}"
    if first.std == second.std:
        return Outcome(measured, UNDECIDED)
    ratio = (first.std / second.std) ** 2 if second.std else math.inf
    p = float(stats.f.cdf(ratio, first.runs - 1, second.runs - 1))
    return Outcome(measured, decided(p < LEVEL, p > 1 - LEVEL))


def trend(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """A metric falls from row to row: Kendall's τ over all their runs, one-sided."""
    values = [row.results.values(epoch + test["metric"]) for row in rows]
    order = [place for place, of_row in enumerate(values) for _ in of_row]
    flat = [value for of_row in values for value in of_row]
    falls, rises = (stats.kendalltau(order, flat, alternative=side).pvalue for side in ("less", "greater"))
    digits = METRICS[test["metric"]].digits
    measured = ", ".join(f"{stdlib.mean(of_row):.{digits}f}" for of_row in values)
    return Outcome(measured, decided(falls < LEVEL, rises < LEVEL))


def time(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """Steps or seconds of training to a validation accuracy, of one row below another's: an exact rank test, in which
    runs that never reach it come last."""
    unit, curves = test["in"], [row.timed(test["in"]) for row in rows]
    if unit == "seconds":
        unit = next(name for name in SECONDS if all(name in curve for of_row in curves for curve in of_row))
    first, second = (
        [reached(row, curve, test["reaching"], unit) for curve in of_row] + [math.inf] * row.results.diverged
        for row, of_row in zip(rows, curves, strict=True)
    )
    exact = stats.PermutationMethod(n_resamples=math.inf)
    sooner, later = (
        stats.mannwhitneyu(first, second, alternative=side, method=exact).pvalue for side in ("less", "greater")
    )
    told = [
        f"{'never' if math.isinf(middle := stdlib.median(found)) else f'{middle:,.0f}'} "
        f"({sum(map(math.isfinite, found))} of {len(found)} runs)"
        for found in (first, second)
    ]
    return Outcome(f"median {told[0]} against {told[1]}", decided(sooner <= LEVEL, later <= LEVEL))


def reached(row: Evidence, curve: pd.DataFrame, accuracy: float, unit: str) -> float:
    """Steps, or seconds by a column of metrics.csv, until the end of the first epoch with this validation accuracy."""
    there = curve["validation/accuracy"] >= accuracy
    if not there.any():
        return math.inf
    upto = curve[: int(there.to_numpy().argmax()) + 1]
    if unit != "steps":
        return float(upto[unit].sum())
    return len(upto) * steps_per_epoch(row.results.records[0])


def solved(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """All runs of a row solve the task, or none."""
    values = rows[0].results.values(epoch + SOLVED)
    wanted, count = test["by"] == "all", int(sum(values))
    all_do, none_does = count == len(values), count == 0
    verdict = decided(all_do, none_does) if wanted else decided(none_does, all_do)
    return Outcome(f"{count} of {len(values)} runs", verdict)


STATISTICS: dict[str, Callable[[dict[str, Any], Sequence[Evidence], str], Outcome]] = {
    function.__name__: function for function in (mean, spread, trend, time, solved)
}


def stated(test: dict[str, Any]) -> str:
    """A test in words."""
    heading = METRICS[test["metric"]].heading if "metric" in test else ""
    match test["statistic"]:
        case "mean":
            times = f"{test['times']} × " if "times" in test else ""
            minus = f" minus {times}that of {test['minus']}" if "minus" in test else ""
            side = "above" if "above" in test else "below"
            return f"{heading} of {test['of']}{minus} is {side} {test[side]:g}"
        case "spread":
            return f"{heading} of {test['of']} varies less than that of {test['below']}"
        case "trend":
            return f"{heading} of {test['of']} falls over {', '.join(test['over'])}"
        case "time":
            goal = f"a validation accuracy of {test['reaching']:g}"
            return f"{test['of']} takes fewer {test['in']} to {goal} than {test['below']}"
        case _:
            return f"{test['of']} solves the task in {'all runs' if test['by'] == 'all' else 'no run'}"


def labels(test: dict[str, Any]) -> list[str]:
    """Of the rows that a test is about."""
    if "over" in test:
        return [test["of"].format(λ=value) for value in test["over"]]
    other = test["below"] if test["statistic"] in ("spread", "time") else test.get("minus")
    return [test["of"], *([other] if other else [])]


def evaluate(test: dict[str, Any], rows: Sequence[Evidence], epoch: str) -> Outcome:
    """The outcome of a test at an epoch ("" or "last_"), or why it has none."""
    runs = min(row.runs(test) for row in rows)
    if runs < 2:
        return Outcome(MISSING, TOO_FEW)
    outcome = STATISTICS[test["statistic"]](test, rows, epoch)
    if runs < LEAST_RUNS:
        return replace(outcome, verdict=TOO_FEW)
    incomplete = test["statistic"] in ("mean", "spread", "trend") and any(row.results.diverged for row in rows)
    return replace(outcome, verdict=UNDECIDED) if incomplete else outcome


def read(results: Path) -> list[Claim]:
    """All claims, judged by the records in a folder of published results.

    Raises:
        ConfigError: a claim names a row that its experiment lacks, or records contradict one another.
    """
    content = experiments.read(experiments.FOLDER / f"{experiments.CLAIMS}.yaml")

    @cache
    def evidence(name: str) -> tuple[Experiment, dict[str, Evidence]]:
        experiment = experiments.load(name)
        return experiment, published(experiment, results / content["records"][name])

    def finding(test: dict[str, Any]) -> Finding:
        name = test["experiment"]
        experiment, found = evidence(name)
        if unknown := [label for label in labels(test) if label not in found]:
            raise ConfigError(f"{experiments.CLAIMS}: {name} has no row {unknown[0]!r}")
        rows = [found[label] for label in labels(test)]
        best, last = evaluate(test, rows, ""), evaluate(test, rows, LAST)
        other = any(other_data(experiment, row.results) for row in rows)
        statement = f"{stated(test)}{' (on other data than the paper)' if other else ''}"
        profiles = [record.get("profile", {}) for row in rows for record in row.results.records]
        notes = list(dict.fromkeys(profile["note"] for profile in profiles if profile.get("note")))
        return Finding(statement, content["records"][name], [row.results.done for row in rows], notes, best, last)

    return [
        Claim(
            entry["claim"],
            entry["source"],
            [finding({"experiment": entry["experiment"]} | test) for given in entry["tests"] for test in each(given)],
        )
        for entry in content["claims"]
    ]


def each(test: dict[str, Any]) -> list[dict[str, Any]]:
    """A test for each value of `for`, which stands for {} in the names of rows."""
    if "for" not in test:
        return [test]
    return [
        {key: value.replace("{}", str(one)) if isinstance(value, str) else value for key, value in test.items()}
        for one in test["for"]
    ]


def published(experiment: Experiment, folder: Path) -> dict[str, Evidence]:
    """The published runs of each row of an experiment, by the row's label; a folder that is not there has none.

    Raises:
        ConfigError: a row's runs differ in more than the seed.
    """
    files = sorted((folder / "records").glob("*/*/*.json"))
    records = [(read_published(file), file.with_suffix(".csv")) for file in files]
    found = {}
    for row in experiment.rows:
        settings = _settings(row)
        own = [(record, curve) for record, curve in records if holds(settings, record["config"])]
        protocols = {json.dumps(record["config"] | {"seed": 0}, sort_keys=True) for record, _ in own}
        if len(protocols) > 1:
            raise ConfigError(f"{folder}: the runs of {row.label} differ in more than the seed")
        complete = [record for record, _ in own if "error" not in record]
        policy = own[0][0]["config"]["model"]["policy"] if own else ""
        ended = Results(row, policy, len(own), complete, len(own) - len(complete))
        timed = [(record, curve) for record, curve in own if "error" not in record and curve.exists()]
        curves = [pd.DataFrame(read_curves(curve, record)) for record, curve in timed]
        found[row.label] = Evidence(ended, curves)
    return found


def _settings(row: Row) -> dict[str, Any]:
    """What the overrides of a row say of a run's config: a group, such as model=lstm, by its name."""
    settings = [one if "." in one.partition("=")[0] else one.replace("=", ".name=", 1) for one in row.overrides]
    content = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def tables(claims: Sequence[Claim]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """As people read them: the claims, their tests, and by what protocol the runs were trained."""
    overview = pd.DataFrame(
        {
            "": number,
            "Claim": claim.text,
            "Where": claim.source,
            "Best epoch": claim.best,
            "Last epoch": claim.last,
        }
        for number, claim in enumerate(claims, 1)
    )
    tests = pd.DataFrame(
        {
            "": number,
            "Test": finding.statement,
            "Records": finding.folder,
            "Runs": ", ".join(map(str, finding.runs)),
            "Best epoch": finding.best.measured,
            "Verdict": finding.best.verdict,
            "Last epoch": finding.last.measured,
            "Verdict ": finding.last.verdict,
        }
        for number, claim in enumerate(claims, 1)
        for finding in claim.findings
    )
    said: dict[str, dict[str, None]] = {}
    for finding in (finding for claim in claims for finding in claim.findings):
        said.setdefault(finding.folder, {}).update(dict.fromkeys(finding.protocols))
    protocols = pd.DataFrame({"Records": folder, "Protocol": " / ".join(notes)} for folder, notes in said.items())
    return overview, tests, protocols


def markdown(claims: Sequence[Claim]) -> str:
    """The tables, with their legend."""
    legend = (
        "Made from the records in this folder. A test holds if it is shown at 5 %, and does not if the contrary is: "
        "means by Welch's t-test, with 90 % intervals, spreads by an F-test, trends by Kendall's τ, times by an exact "
        f"rank test. A row of fewer than {LEAST_RUNS} runs decides nothing. A claim holds if all its tests do. Best "
        "epoch: the one with the best validation score. Not tested: no statistic of the records can show it. Verdicts "
        "are on the runs' protocols, the last table, which are not all as published."
    )
    overview, *rest = (table.to_markdown(index=False, disable_numparse=True) for table in tables(claims))
    return "\n\n".join(["# What the papers claim", overview, legend, *rest]) + "\n"

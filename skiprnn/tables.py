"""Run records -> a table like the paper's: Markdown, CSV and LaTeX, the published numbers beside ours.

python -m skiprnn.tables experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]
"""

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from skiprnn.papers import experiments
from skiprnn.papers.experiments import Experiment, PlannedRun
from skiprnn.training.config import ConfigError, TrainingConfig
from skiprnn.training.folder import read_record

MISSING = "–"
CONFIDENCE = 0.95
VERDICT = (
    "Verdict: difference to the published mean with its 95 % confidence interval (Welch's, from both standard "
    "deviations; from ours alone where none is published). Agrees: it holds 0, up to the published mean's rounding. "
    "Better: higher accuracy, or fewer state updates. Too few runs: fewer than two."
)
LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "λ": r"$\lambda$", "–": "--"}
)


@dataclass(frozen=True)
class Metric:
    """A column: its heading, the digits shown (None: as a power of ten), and what is better: +1 more, -1 less."""

    heading: str
    digits: int | None = None
    better: int = 0  # 0: not compared
    share: bool = False  # of the runs: shown as yes or no, without a spread


METRICS = {
    "task_solved": Metric("Task solved", 2, better=+1, share=True),
    "accuracy": Metric("Accuracy", 3, better=+1),
    "mse": Metric("MSE", 6, better=-1),
    "state_updates": Metric("State updates", 2, better=-1),
    "state_updates_percent": Metric("State updates (%)", 1, better=-1),
    "inference_flops": Metric("Inference FLOPs"),
    "inference_flops_with_cnn": Metric("Inference FLOPs with the CNN"),
}
LAST = "last_"  # before a metric's name: at the last epoch
METRICS |= {LAST + name: replace(metric, heading=f"{metric.heading} (last epoch)") for name, metric in METRICS.items()}


def measured(record: dict[str, Any], metric: str) -> float | None:
    """A metric of a run, of the test set: at the epoch with the best validation score, as the authors' script for MNIST
    asks for; or at the last epoch, where their scripts for the synthetic tasks stand when they are interrupted.
    """
    test = record["final" if metric.startswith(LAST) else "best"]["test"]
    match metric.removeprefix(LAST):
        case "task_solved":
            bound = record["solved_at"]
            return float(test["mse"] < bound if record["task"] == "regression" else test["accuracy"] > bound)
        case "state_updates_percent":
            return 100 * test["state_updates"] / record["steps"]
        case "inference_flops_with_cnn":
            cnn = record["input_flops"]  # of each frame that is used
            return None if cnn is None else test["inference_flops"] + test["state_updates"] * cnn
        case name:
            return test[name]


def rows(experiment: Experiment, planned: Sequence[PlannedRun]) -> pd.DataFrame:
    """One line per row, numbers as numbers: mean and sample standard deviation over the complete runs; the verdict."""
    lines = []
    for row, group in groupby(planned, lambda one: one.row):
        runs = list(group)
        records = [one.folder.record() for one in runs if one.folder.complete]
        line: dict[str, Any] = {"model": row.label}
        for metric in experiment.columns:
            values = [value for record in records if (value := measured(record, metric)) is not None]
            mean = statistics.mean(values) if values else None
            std = statistics.stdev(values) if len(values) > 1 and not METRICS[metric].share else None
            published = row.published.get(metric.removeprefix(LAST))
            published_mean, published_std = published if isinstance(published, list) else (published, None)
            line |= {f"{metric}_mean": mean, f"{metric}_std": std}
            if not metric.startswith(LAST):  # it is published once
                line |= {f"published_{metric}_mean": published_mean, f"published_{metric}_std": published_std}
            if METRICS[metric].better and published is not None:
                ours, theirs = (mean, std, len(values)), (published_mean, published_std, experiment.published_runs)
                line |= {f"{metric}_{key}": value for key, value in compare(metric, ours, theirs).items()}
        lines.append(line | {"runs_done": len(records), "runs_planned": len(runs)})
    return pd.DataFrame(lines).dropna(axis="columns", how="all")


def compare(metric: str, ours: tuple, published: tuple) -> dict[str, Any]:
    """Our mean against the published one: difference, the ends of its confidence interval, and the verdict.

    The interval is Welch's. A mean that is published without a standard deviation is taken as exact, which leaves the
    interval of our mean alone. Zero is in the interval also where it misses it by less than the published rounding.

    Args:
        ours, published: mean, sample standard deviation and number of runs each.
    """
    mean, std, runs = ours
    published_mean, published_std, published_runs = published
    if runs < 2:
        return {"verdict": "too few runs"}
    if METRICS[metric].share:  # of all runs or not: it is published of the row as a whole
        mean = float(mean == 1)
    difference = mean - published_mean
    parts = [(std**2 / runs, runs - 1)] if std else []
    parts += [(published_std**2 / published_runs, published_runs - 1)] if published_std else []
    half = 0.0
    if parts:
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
        half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * variance**0.5
    low, high = difference - half, difference + half
    verdict = "better" if METRICS[metric].better * difference > 0 else "worse"
    if round(low, METRICS[metric].digits) <= 0 <= round(high, METRICS[metric].digits):
        verdict = "agrees"
    return {"difference": difference, "low": low, "high": high, "verdict": verdict}


def _cell(line: pd.Series, name: str) -> str:
    """A metric as people read it: mean ± std, mean alone without a spread, or a dash."""
    mean, std = line.get(f"{name}_mean"), line.get(f"{name}_std")
    metric = METRICS[name.removeprefix("published_")]
    digits = metric.digits
    if pd.isna(mean):
        return MISSING
    if metric.share:
        return {0: "no", 1: "yes"}.get(mean, f"{mean:.0%} of runs")
    if digits is None:
        return f"{mean:.2e}".replace("e+0", "e").replace("e+", "e")
    return f"{mean:.{digits}f}" if pd.isna(std) else f"{mean:.{digits}f} ± {std:.{digits}f}"


def layout(experiment: Experiment, numbers: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: text, the published numbers beside ours."""
    columns = {METRICS[metric].heading: metric for metric in experiment.columns}
    for heading, metric in list(columns.items()):
        if f"published_{metric}_mean" in numbers:
            columns[f"{heading} (paper)"] = f"published_{metric}"
    return pd.DataFrame(
        {"Model": line["model"]}
        | {heading: _cell(line, name) for heading, name in columns.items()}
        | {"Runs": f"{line['runs_done']} / {line['runs_planned']}"}
        for _, line in numbers.iterrows()
    )


def verdicts(experiment: Experiment, numbers: pd.DataFrame) -> pd.DataFrame:
    """The comparison as people read it; empty if nothing is published."""
    compared = [metric for metric in experiment.columns if f"{metric}_verdict" in numbers]

    def cell(line: pd.Series, metric: str) -> str:
        verdict, digits = line[f"{metric}_verdict"], METRICS[metric].digits
        if pd.isna(verdict):
            return MISSING
        if METRICS[metric].share or verdict == "too few runs":
            return verdict
        difference, low, high = (line[f"{metric}_{key}"] for key in ("difference", "low", "high"))
        return f"{difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {verdict}"

    return pd.DataFrame(
        {"Model": line["model"]} | {METRICS[metric].heading: cell(line, metric) for metric in compared}
        for _, line in numbers.iterrows()
        if compared
    )


def protocol(training: TrainingConfig) -> str:
    """How a run was trained, in words."""
    rising = f"rising until epoch {training.warmup_epochs + 1}" if training.warmup_epochs else ""
    falling = f"falling after epoch {training.epochs - training.decay_epochs}" if training.decay_epochs else ""
    course = f" ({', '.join(filter(None, [rising, falling]))})" if rising or falling else ""
    free = f", λ = 0 before epoch {training.cost_free_epochs + 1}" if training.cost_free_epochs else ""
    return (
        f"{training.epochs} epochs, batch {training.batch_size}, Adam, learning rate {training.learning_rate:g}"
        f"{course}, gradient norm clipped at {training.gradient_clip:g}{free}"
    )


def caption(experiment: Experiment, planned: Sequence[PlannedRun]) -> str:
    """What the table shows, by which protocol, on which data, and what it is compared with."""
    rows: dict[str, list[str]] = {}  # by protocol
    for one in planned:
        rows.setdefault(protocol(one.run.training), []).append(one.row.label)
    protocols = [f"{', '.join(dict.fromkeys(rows[text]))}: {text}" if len(rows) > 1 else text for text in rows]
    epoch = "the epoch with the best validation score"
    if any(metric.startswith(LAST) for metric in experiment.columns):
        epoch += " and, since the paper names none, at the last one"
    text = (
        f"{experiment.title}. {planned[0].run.profile.get('note', '')} {'; '.join(protocols)}; test set at {epoch}; "
        "mean ± sample standard deviation over the runs done."
    )
    records = [one.folder.record() for one in planned if one.folder.complete]
    if records and "task_solved" in experiment.columns:
        score = "an MSE below" if "mse" in experiment.columns else "an accuracy above"
        text += f" Solved: {score} {records[0]['solved_at']:.3g}, for the verdict in all runs."
    if notes := dict.fromkeys(record["note"] for record in records if record.get("note")):
        text += f" Data: {'; or '.join(notes)}."
    return f"{text} Paper: {experiment.source}."


def publish(experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None) -> str:
    """Write table.md, .csv and .tex; returns the Markdown.

    Args:
        experiment, planned: as from skiprnn.papers.experiments.requested.
        folder: where; None: OUTPUT/tables/EXPERIMENT_PROFILE. If given, records and metrics per epoch are copied
            beside the table, after those that lie there already have been taken over.

    Raises:
        ConfigError: a record in the folder is not that of its run.
    """
    target = folder or experiment.folder(planned[0].run)
    target.mkdir(parents=True, exist_ok=True)
    if folder:
        exchange_records(planned, folder / "records")
    numbers = rows(experiment, planned)
    parts = [(layout(experiment, numbers), caption(experiment, planned), experiment.name)]
    if not (judged := verdicts(experiment, numbers)).empty:
        parts.append((judged, VERDICT, f"{experiment.name}-verdict"))
    markdown = "\n".join(
        f"{text.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n" for text, note, _ in parts
    )
    latex = "\n".join(
        text.map(_latex).rename(columns=_latex).to_latex(index=False, caption=_latex(note), label=f"tab:{label}")
        for text, note, label in parts
    )
    (target / "table.md").write_text(markdown)
    (target / "table.tex").write_text(latex)
    numbers.to_csv(target / "table.csv", index=False)
    return f"{markdown}\nwritten to {target}/"


def exchange_records(planned: Sequence[PlannedRun], published: Path) -> None:
    """Copy the records of complete runs, and their metrics per epoch where they are known, to the published ones, and
    the other way round: a run that another machine published is complete here as well, so that a table and its curves
    can be continued anywhere.

    Raises:
        ConfigError: a published record is damaged, or another run's.
    """
    for one in planned:
        file, epochs = published / f"{one.run.name}.json", published / f"{one.run.name}.csv"
        if one.folder.complete:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(one.folder.record_file, file)
            if one.folder.metrics_file.exists():
                shutil.copyfile(one.folder.metrics_file, epochs)
        elif file.exists():
            one.folder.take_over(read_record(file, one.run), epochs.read_bytes() if epochs.exists() else None)


def _latex(text: str) -> str:
    """Signs that LaTeX reads otherwise, its own and the few of ours."""
    return text.translate(LATEX)


def main(arguments: Sequence[str]) -> None:
    """Render the table of an experiment from the records that exist."""
    try:
        experiment, planned, folder = experiments.requested(arguments)
        if not experiment:
            raise ConfigError("experiment=NAME is missing: which table?")
        print(publish(experiment, planned, folder))
        if damages := [damage for one in planned if (damage := one.folder.damage)]:
            raise ConfigError("; ".join(damages))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

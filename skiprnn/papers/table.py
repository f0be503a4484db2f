"""A table as people read it: layout, caption; Markdown, CSV and LaTeX."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from skiprnn.papers.experiments import METRICS, SOLVED, UPDATES, Experiment
from skiprnn.papers.plan import HOW, PlannedRun
from skiprnn.papers.records import both_epochs, exchange, results
from skiprnn.papers.statistics import LEAST_RUNS, other_data, rows
from skiprnn.training.config import TrainingConfig
from skiprnn.training.folder import write_atomically

MISSING = "–"
NOT_COMPARABLE = "Rows trained by different protocols are not comparable: what differs may be due to these. "
LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "λ": r"$\lambda$", "–": "--"}
)


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
    columns = {METRICS[metric].heading: metric for metric in both_epochs(experiment.columns)}
    for metric in experiment.columns:
        if f"published_{metric}_mean" in numbers:
            columns[f"{METRICS[metric].heading} (paper)"] = f"published_{metric}"
    return pd.DataFrame(
        {"Model": line["model"]}
        | {heading: _cell(line, name) for heading, name in columns.items()}
        | {"Runs": _runs(line)}
        for _, line in numbers.iterrows()
    )


def _runs(line: pd.Series) -> str:
    """How many runs are done, and how they ended."""
    diverged = f", {line['runs_diverged']} diverged" if line["runs_diverged"] else ""
    return f"{line['runs_done']} / {line['runs_planned']}{diverged}"


def verdicts(experiment: Experiment, numbers: pd.DataFrame) -> pd.DataFrame:
    """The comparison as people read it; empty if nothing is compared."""
    compared = [metric for metric in both_epochs(experiment.columns) if f"{metric}_verdict" in numbers]

    def cell(line: pd.Series, metric: str) -> str:
        verdict, digits = line[f"{metric}_verdict"], METRICS[metric].digits
        if pd.isna(verdict):
            return MISSING
        if pd.isna(difference := line.get(f"{metric}_difference")):
            return verdict
        low, high, margin = (line[f"{metric}_{key}"] for key in ("low", "high", "margin"))
        interval = f"{difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        return f"{verdict}: {interval}, margin {margin:.{digits}f}"

    return pd.DataFrame(
        {"Model": line["model"]} | {METRICS[metric].heading: cell(line, metric) for metric in compared}
        for _, line in numbers.iterrows()
        if compared
    )


def legend(experiment: Experiment) -> str:
    """What the verdicts mean."""
    margins = [
        METRICS[metric].heading + (f" {100 * margin:g} % of the steps" if metric == UPDATES else f" {margin:g}")
        for metric, margin in experiment.margins.items()
    ]
    text = (
        "Verdict: difference to the published mean [its 90 % confidence interval, Welch's], margin. Reproduced: the "
        "interval is within the margin. Close: it is, and the difference is no chance (Welch's test at 5 %, corrected "
        "over the rows by Holm). Differs: the difference is no chance, and the interval not within. Undecided: none of "
        f"these, fewer than {LEAST_RUNS} runs, or a diverged one. Fixed: by construction. Margin: "
        f"{', '.join(margins)}, or two published standard deviations if these are more."
    )
    if SOLVED in experiment.columns:
        text += " Of a task, reproduced is what all runs show as published, and differs what none does."
    return text


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
    protocols = by_protocol(planned)
    training = [f"{', '.join(labels)}: {text}" if len(protocols) > 1 else text for text, labels in protocols.items()]
    since = " (since λ counts)" if any(one.run.training.cost_free_epochs for one in planned) else ""
    note = planned[0].run.profile.get("note", "")
    if changed := _settings(planned):
        note += f" Here with {', '.join(changed)}."
    text = (
        f"{experiment.title}. {note} {'; '.join(training)}. Test set at the epoch with the best validation score"
        f"{since} and, where it says so, at the last epoch; mean ± sample standard deviation over the runs done."
    )
    ended = list(results(planned))
    if any(row.diverged for row in ended):
        text += " A diverged run is done, has solved nothing, and is in no mean."
    records = [record for row in ended for record in row.records]
    if records and SOLVED in experiment.columns:
        score = {"mse": "an MSE below", "accuracy": "an accuracy above"}[experiment.score]
        text += f" Solved: {score} {records[0]['solved_at']:.3g}."
    if notes := dict.fromkeys(record["note"] for record in records if record.get("note")):
        text += f" Data: {'; or '.join(notes)}."
    if any(other_data(experiment, row) for row in ended):
        text += " They are other data than the paper's, whose numbers stand beside them to compare directions."
    return f"{text} Paper: {experiment.source}." if experiment.source else text


def _settings(planned: Sequence[PlannedRun]) -> list[str]:
    """What the command line sets for all runs, on top of rows and profile, that makes them what they are."""
    return [
        one
        for one in planned[0].overrides
        if one.startswith(("data.", "model.", "training."))
        and not any(one in run.row.overrides or one not in run.overrides for run in planned)
    ]


def by_protocol(planned: Sequence[PlannedRun]) -> dict[str, list[str]]:
    """The labels of the rows under each protocol."""
    found: dict[str, dict[str, None]] = {}
    for one in planned:
        found.setdefault(protocol(one.run.training), {})[one.row.label] = None
    return {text: list(labels) for text, labels in found.items()}


def publish(
    experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None, command: Sequence[str] = ()
) -> str:
    """Write table.md, .csv and .tex; returns the Markdown.

    Args:
        experiment, planned: as from skiprnn.papers.plan.requested.
        folder: where; None: OUTPUT/tables/EXPERIMENT_PROFILE. If given, records and metrics per epoch are copied
            beside the table, after those that lie there already have been taken over.
        command: the overrides as typed, which a published table ends with.

    Raises:
        ConfigError: a record in the folder is not that of its run.
    """
    target = folder or experiment.folder(planned[0].run)
    target.mkdir(parents=True, exist_ok=True)
    if folder:
        exchange(planned, folder / "records")
    numbers = rows(experiment, planned)
    warning = NOT_COMPARABLE if len(by_protocol(planned)) > 1 else ""
    parts = [(layout(experiment, numbers), f"{warning}{caption(experiment, planned)}", experiment.name)]
    if not (judged := verdicts(experiment, numbers)).empty:
        parts.append((judged, legend(experiment), f"{experiment.name}-verdict"))
    markdown = "\n".join(
        f"{text.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n" for text, note, _ in parts
    )
    markdown = f"{warning.strip()}\n\n{markdown}" if warning else markdown
    if folder:
        made = shlex.join(one for one in command if one.split("=")[0] not in HOW)
        markdown += f"\nMade by `python -m skiprnn.tables {made}`.\n"
    latex = "\n".join(
        text.map(_latex).rename(columns=_latex).to_latex(index=False, caption=_latex(note), label=f"tab:{label}")
        for text, note, label in parts
    )
    for file, content in (("table.md", markdown), ("table.tex", latex), ("table.csv", numbers.to_csv(index=False))):
        write_atomically(target / file, content.encode())
    return f"{markdown}\nwritten to {target}/"


def _latex(text: str) -> str:
    """Signs that LaTeX reads otherwise, its own and the few of ours."""
    return text.translate(LATEX)

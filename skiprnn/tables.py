"""Run records -> a table like the paper's: Markdown, CSV and LaTeX, the published numbers beside ours.

python -m skiprnn.tables experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]
"""

import shutil
import statistics
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.errors import HydraException

from skiprnn import experiments
from skiprnn.config import ConfigError
from skiprnn.experiments import Experiment, PlannedRun

MISSING = "–"
LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "λ": r"$\lambda$", "–": "--"}
)


def rows(planned: Sequence[PlannedRun]) -> pd.DataFrame:
    """One line per row, numbers as numbers: mean and sample standard deviation over the complete runs.

    The metrics are those of the test set at the epoch with the best validation score, as the authors report.
    """
    lines = []
    for row, group in groupby(planned, lambda one: one.row):
        runs = list(group)
        records = [one.folder.record() for one in runs if one.folder.complete]
        line: dict[str, Any] = {"model": row.label}
        for metric in ("accuracy", "mse", "state_updates", "inference_flops"):
            values = [record["best"]["test"][metric] for record in records if metric in record["best"]["test"]]
            line[f"{metric}_mean"] = statistics.mean(values) if values else None
            line[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
            published = row.published.get(metric)
            mean, std = published if isinstance(published, list) else (published, None)
            line[f"published_{metric}_mean"], line[f"published_{metric}_std"] = mean, std
        lines.append(line | {"runs_done": len(records), "runs_planned": len(runs)})
    return pd.DataFrame(lines).dropna(axis="columns", how="all")


def _spread(line: pd.Series, metric: str, digits: int) -> str:
    """mean ± std, mean alone for a single run, or a dash."""
    mean, std = line.get(f"{metric}_mean"), line.get(f"{metric}_std")
    if pd.isna(mean):
        return MISSING
    return f"{mean:.{digits}f}" if pd.isna(std) else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _power(line: pd.Series, metric: str) -> str:
    mean = line.get(f"{metric}_mean")
    return MISSING if pd.isna(mean) else f"{mean:.2e}".replace("e+0", "e")


def layout(numbers: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: text, the published numbers beside ours."""
    score, digits = ("Accuracy", 3) if "accuracy_mean" in numbers or "mse_mean" not in numbers else ("MSE", 6)
    lines = []
    for _, line in numbers.iterrows():
        cells = {"Model": line["model"]}
        for prefix, suffix in (("", ""), ("published_", " (paper)")):
            if prefix and not any(str(column).startswith(prefix) for column in numbers):
                continue
            cells |= {
                f"{score}{suffix}": _spread(line, prefix + score.lower(), digits),
                f"State updates{suffix}": _spread(line, f"{prefix}state_updates", 2),
                f"Inference FLOPs{suffix}": _power(line, f"{prefix}inference_flops"),
            }
        lines.append(cells | {"Runs": f"{line['runs_done']} / {line['runs_planned']}"})
    return pd.DataFrame(lines)


def caption(experiment: Experiment, planned: Sequence[PlannedRun]) -> str:
    """What the table shows, by which protocol, and what it is compared with."""
    run = planned[0].run
    training = run.training
    text = (
        f"{experiment.title}. {run.profile.get('note', '')} {training.epochs} epochs, batch {training.batch_size}, "
        f"Adam, learning rate {training.learning_rate:g}, gradient norm clipped at {training.gradient_clip:g}"
    )
    if training.cost_free_epochs:
        text += f", λ = 0 in the first {training.cost_free_epochs} epochs"
    if training.decay_epochs:
        text += f", falling in the last {training.decay_epochs} epochs"
    text += (
        "; test set at the epoch with the best validation score; mean ± sample standard deviation over the runs done. "
        f"Paper: {experiment.source}."
    )
    return text


def publish(experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None) -> str:
    """Write table.md, .csv and .tex; returns the Markdown.

    Args:
        experiment, planned: as from skiprnn.experiments.
        folder: where; None: OUTPUT/tables/EXPERIMENT_PROFILE. If given, the records are copied beside the table.
    """
    run = planned[0].run
    target = folder or Path(run.output) / "tables" / f"{experiment.name}_{run.profile.get('name', 'custom')}"
    target.mkdir(parents=True, exist_ok=True)
    numbers = rows(planned)
    text, note = layout(numbers), caption(experiment, planned)
    markdown = f"{text.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n"
    (target / "table.md").write_text(markdown)
    numbers.to_csv(target / "table.csv", index=False)
    escaped = text.map(_latex).rename(columns=_latex)
    (target / "table.tex").write_text(
        escaped.to_latex(index=False, caption=_latex(note), label=f"tab:{experiment.name}")
    )
    if folder:
        for one in planned:
            if one.folder.complete:
                record = target / "records" / f"{one.run.name}.json"
                record.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one.folder.record_file, record)
    return f"{markdown}\nwritten to {target}/"


def _latex(text: str) -> str:
    """Signs that LaTeX reads otherwise, its own and the few of ours."""
    return text.translate(LATEX)


def main(arguments: Sequence[str]) -> None:
    """Render the table of an experiment from the records that exist."""
    overrides = [argument for argument in arguments if not argument.startswith("publish=")]
    folders = [Path(argument.removeprefix("publish=")) for argument in arguments if argument.startswith("publish=")]
    conf = Path(__file__).resolve().parent.parent / "conf"
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            name = hydra.compose("config", overrides)["experiment"]
            if not name:
                raise ConfigError("experiment=NAME is missing: which table?")
            experiment = experiments.load(name)
            planned = experiments.plan(experiment, [overrides], lambda given: hydra.compose("config", list(given)))
        print(publish(experiment, planned, folders[-1] if folders else None))
    except (ConfigError, HydraException) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])

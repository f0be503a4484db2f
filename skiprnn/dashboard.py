"""Run folders -> one HTML page: how far each sweep is, its table and curves, which samples its models use.

    python -m skiprnn.dashboard [outputs] [--page outputs/dashboard.html]
    python -m skiprnn.dashboard --wandb [ENTITY/]PROJECT

The page opens from disk and needs no network; make it again to see how far a sweep has come. The second form writes the
same views as a workspace on wandb, from what the runs logged there.
"""

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import pandas as pd
import vl_convert

from skiprnn.model.policies import POLICIES
from skiprnn.papers import statistics, table
from skiprnn.papers.experiments import Experiment, Row
from skiprnn.papers.plan import PlannedRun, SavedPlan, saved_plans
from skiprnn.papers.records import METRICS
from skiprnn.training.config import ConfigError, RunConfig, arguments_of
from skiprnn.training.folder import RunFolder, read_metrics, write_atomically

EPOCHS_DRAWN = 60  # of a curve
PICTURES, UNFINISHED = 24, 100  # shown at most
Tell = Callable[[str], object]  # hears of a damaged file, without which the page is made


def plans(output: Path, tell: Tell) -> list[SavedPlan]:
    """The sweeps into an output folder, latest first, each data set apart; then its other runs."""
    saved = saved_plans(output, tell)
    planned = {one.folder.path for plan in saved for one in plan.planned}
    single = []
    for file in sorted(output.glob("*/*/*/config.yaml")):
        if file.parent not in planned:
            try:
                run = RunConfig.of(json.loads(file.read_bytes()), output=str(output))
            except ConfigError:
                continue  # another version's
            except (ValueError, RecursionError):
                tell(f"{file} is damaged; the command that began the run writes it again")
                continue
            if RunFolder(run).path == file.parent:
                single.append(PlannedRun(Row(run.row), run, ()))
    saved += [SavedPlan(Experiment("", "single runs", "", ()), "", tuple(single))] if single else []
    apart = []
    for plan in saved:
        names = dict.fromkeys(one.run.data["name"] for one in plan.planned)
        for name in names:
            runs = tuple(one for one in plan.planned if one.run.data["name"] == name)
            title = f"{plan.experiment.title} ({name})" if len(names) > 1 else plan.experiment.title
            apart.append(SavedPlan(replace(plan.experiment, title=title), plan.command, runs))
    return apart


def view(plan: SavedPlan, tell: Tell) -> dict[str, Any]:
    """What the page shows of a sweep over one data set: numbers and texts only."""
    experiment = plan.experiment
    record = next((one.folder.record() for one in plan.planned if one.folder.complete), None)
    if not experiment.name and record and record["task"] == "regression":
        experiment = replace(experiment, columns=("mse", *experiment.columns[1:]))
    numbers = statistics.rows(experiment, plan.planned)
    text, verdicts = table.layout(experiment, numbers), table.verdicts(experiment, numbers)
    score = "mse" if "mse" in experiment.columns else "accuracy"
    updates = next(metric for metric in experiment.columns if metric.startswith("state_updates"))
    rows: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    unfinished: list[dict[str, Any]] = []
    for index, (_, group) in enumerate(groupby(plan.planned, lambda one: one.row.label)):
        runs = list(group)
        model, line = runs[0].run.model, numbers.iloc[index]
        epochs = [one.run.training.epochs if one.folder.complete else one.folder.epochs_done() for one in runs]
        for one, done in zip(runs, epochs, strict=True):
            if not one.folder.complete:
                unfinished.append(progress(one, done))
            if damage := one.folder.damage:
                tell(damage)
        picture = next((file for one in runs for file in [one.folder.path / "usage.png"] if file.exists()), None)
        if picture and len(pictures) < PICTURES:
            pictures.append({"row": index, "png": base64.b64encode(picture.read_bytes()).decode()})
        rows.append(
            {
                "label": text["Model"][index],
                "model": model.name,
                "lambda": f"{model.cost_per_sample:g}" if POLICIES[model.policy].learned else "none",
                "epochs": [sum(epochs), sum(one.run.training.epochs for one in runs)],
                "score": spread(line, score),
                "updates": spread(line, updates),
                "paper": [spread(line, f"published_{score}"), spread(line, f"published_{updates}")],
                "curve": curve([one.folder.metrics_file for one in runs], f"validation/{score}", tell),
            }
        )
    states = [one["state"] for one in unfinished]
    return {
        "title": experiment.title,
        "command": plan.command,
        "note": plan.planned[0].run.profile.get("note", ""),
        "score": METRICS[score].heading,
        "updates": METRICS[updates].heading,
        "tables": [{"columns": list(one.columns), "cells": one.to_numpy().tolist()} for one in (text, verdicts)],
        "rows": rows,
        "pictures": pictures,
        "runs": {"planned": len(plan.planned), "complete": len(plan.planned) - len(states)}
        | {state: states.count(state) for state in ("begun", "failed", "waiting")},
        "epochs": [sum(row["epochs"][k] for row in rows) for k in (0, 1)],
        "unfinished": [one for state in ("failed", "begun") for one in unfinished if one["state"] == state],
    }


def progress(one: PlannedRun, epochs: int) -> dict[str, Any]:
    """How far an incomplete run is, and when it last moved."""
    folder = one.folder
    reason = folder.failure
    state = "failed" if reason else "begun" if folder.path.exists() else "waiting"
    moved = datetime.fromtimestamp(folder.metrics_file.stat().st_mtime).strftime("%d %b %H:%M") if epochs else ""
    planned = one.run.training.epochs
    return {"name": one.run.name, "state": state, "epochs": [epochs, planned], "moved": moved, "reason": reason or ""}


def spread(line: pd.Series, metric: str) -> list[float] | None:
    """[mean, standard deviation or 0], or None where nothing was measured."""
    mean, deviation = line.get(f"{metric}_mean"), line.get(f"{metric}_std")
    return None if pd.isna(mean) else [short(mean), 0.0 if pd.isna(deviation) else short(deviation)]


def short(number: float) -> float:
    return float(f"{number:.5g}")


def curve(files: Iterable[Path], column: str, tell: Tell) -> list[list[float]]:
    """[epoch, mean, least, largest] over the files that have it, thinned to what can be seen."""
    values: dict[int, list[float]] = {}
    for file in files:
        if file.exists():
            try:
                columns = read_metrics(file)
            except ConfigError as error:
                tell(str(error))
                continue
            for epoch, value in zip(columns["epoch"], columns.get(column, ()), strict=False):
                values.setdefault(int(epoch), []).append(value)
    every = -(-len(values) // EPOCHS_DRAWN) or 1
    shown = sorted(values)[::-every][::-1]  # the last one is
    return [[n + 1, short(fmean(values[n])), short(min(values[n])), short(max(values[n]))] for n in shown]


def page(output: Path, tell: Tell) -> str:
    """The HTML page of an output folder; damaged files are left out, and told.

    Raises:
        ConfigError: there are no runs in it.
    """
    views = [view(plan, tell) for plan in plans(output, tell)]
    if not views:
        raise ConfigError(f"{output}: no runs here; give the folder that was output= of a sweep")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skiprnn.views", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        views=views,
        charts=[{key: one[key] for key in ("score", "updates", "rows")} for one in views],
        output=str(output),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        most=UNFINISHED,
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace("</script", r"<\/script"),
    )


def workspace(entity: str, project: str) -> Any:
    """The same views as a wandb workspace, not yet saved: trade-off, learning, used samples."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    scores = {"accuracy": "accuracy", "mse": "mean squared error"}
    updates = panels.SummaryMetric("test/state_updates")
    tradeoff: list[Any] = [
        panels.ScatterPlot(
            title=f"Test {title} against state updates", x=updates, y=panels.SummaryMetric(f"test/{key}")
        )
        for key, title in scores.items()
    ]
    tradeoff += [panels.ScatterPlot(title="State updates against λ", x=panels.Config("lambda"), y=updates, log_x=True)]
    learning: list[Any] = [
        panels.LinePlot(title=f"Validation {title}", x="epoch", y=[f"validation/{key}"], groupby_rangefunc="minmax")
        for key, title in (scores | {"state_updates": "state updates", "loss": "loss"}).items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="skiprnn: accuracy against computation",
        sections=[
            workspaces.Section("Accuracy against computation", panels=tradeoff, is_open=True),
            workspaces.Section("Learning", panels=learning, is_open=True),
            workspaces.Section("Used samples", panels=[panels.MediaBrowser(media_keys=["usage"])], is_open=True),
        ],
        settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            pinned_columns=[
                *("config:lambda", "config:p_skip", "config:seed"),
                *("summary:test/accuracy", "summary:test/mse", "summary:test/state_updates", "summary:best_epoch"),
            ],
        ),
    )


def save_workspace(target: str) -> str:
    """Write the workspace to wandb; returns its address.

    Raises:
        ConfigError: no library, no key, no such project, or no server.
    """
    *entity, project = target.split("/")
    try:
        import wandb  # here, for it is slow to import and seldom wanted

        if not wandb.login(prompt=False):
            raise ConfigError("--wandb needs a key: wandb login, or WANDB_API_KEY")
        return workspace(entity[0] if entity else wandb.Api().default_entity or "", project).save().url
    except ModuleNotFoundError as error:
        raise ConfigError(f"--wandb needs {error.name}: pip install 'skiprnn[wandb]'") from None
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb {target}: {str(error).splitlines()[0]}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or the workspace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs"), help="folder of run folders")
    parser.add_argument("--page", type=Path, help="the file to write (OUTPUT/dashboard.html)")
    parser.add_argument("--wandb", metavar="[ENTITY/]PROJECT", help="write the wandb workspace of this project instead")
    given = arguments_of(parser, arguments)
    try:
        if given.wandb:
            print(save_workspace(given.wandb))
            return
        file = given.page or given.output / "dashboard.html"
        left_out: list[str] = []
        write_atomically(file, page(given.output, left_out.append).encode())
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {file}")
    if left_out:
        sys.exit("\n".join(f"error: {problem}" for problem in left_out))


if __name__ == "__main__":
    main()

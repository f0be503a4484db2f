"""What the page shows, from run folders: sweeps with their tables, curves and runs; each run; the papers' claims."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import vl_convert

from skiprnn.model.cells import CELLS
from skiprnn.model.policies import POLICIES
from skiprnn.papers import claims, statistics, table
from skiprnn.papers.experiments import METRICS, Experiment, Row
from skiprnn.papers.plan import PlannedRun, SavedPlan, apart, digest, saved_plans
from skiprnn.papers.records import SECONDS, has_own_time, read_curves, steps_per_epoch
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, locked_files
from skiprnn.training.measures import SCORES
from skiprnn.views import style
from skiprnn.views.curves import Curves, clock, spread

POINTS = 60  # of a curve; fewer where there are many rows
PICTURES = 24  # held in the page, of a sweep
HELD = 300  # runs that a page without a server can show one by one
STATES = {"failed": "failed", "running": "running", "stopped": "begun", "waiting": "waiting", "complete": "complete"}
Tell = Callable[[str], object]  # hears of a damaged file, without which the page is made


def sweeps(output: Path, tell: Tell) -> list[tuple[Experiment, str, list[PlannedRun]]]:
    """The sweeps into an output folder, latest first, each data set apart; then its other runs."""
    plans = saved_plans(output, tell)
    planned = {one.folder.path for plan in plans for one in plan.planned}
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
    plans += [SavedPlan(Experiment("", "single runs", "", ()), "", tuple(single))] if single else []
    return [(one, plan.command, runs) for plan in plans for one, runs in apart(plan.experiment, plan.planned)]


def judged(results: Path) -> list[dict[str, Any]]:
    """The papers' claims and their tests, by a folder of published records."""
    return [tabular(one) for one in claims.tables(claims.read(results))]


def tabular(table: pd.DataFrame) -> dict[str, Any]:
    """As the page has it."""
    return {"columns": list(table.columns), "cells": table.to_numpy().tolist()}


def content(output: Path, tell: Tell, claims: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """All that the page shows but single runs: numbers and texts, as JSON has them. Damaged files are told.

    Args:
        output: folder of run folders.
        claims: what `judged` gave.

    Raises:
        ConfigError: there are no runs.
    """
    found = sweeps(output, tell)
    if not found:
        raise ConfigError(f"{output}: no runs here; give the folder that was output= of a sweep")
    locked = locked_files()
    return {
        "output": str(output),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "sweeps": [sweep(*one, locked, tell) for one in found],
        "claims": list(claims),
    }


def sweep(
    experiment: Experiment, command: str, planned: Sequence[PlannedRun], locked: set[int], tell: Tell
) -> dict[str, Any]:
    """A sweep over one data set."""
    numbers = statistics.rows(experiment, planned)
    score = experiment.score
    updates = next(metric for metric in experiment.columns if metric.startswith("state_updates"))
    shown = {f"validation/{score}": METRICS[score].heading, "validation/state_updates": "State updates"}
    shown |= {"validation/loss": "Loss", "train/loss": "Training loss"}
    groups = [list(group) for _, group in groupby(planned, lambda one: one.row.label)]
    record = next((one.folder.record() for one in planned if one.folder.complete), {})
    colours = style.shades([group[0].run.model for group in groups])
    curves = [curves_of(group, tell) for group in groups]
    used = clock([one for one in curves if one.columns])
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    for index, (group, colour, of_group) in enumerate(zip(groups, colours, curves, strict=True)):
        model, line = group[0].run.model, numbers.iloc[index]
        of_row = [progress(one, index, locked, tell) for one in group]
        runs += of_row
        picture = next((one for one in group if (one.folder.path / "usage.png").exists()), None)
        if picture and len(pictures) < PICTURES:
            png = base64.b64encode((picture.folder.path / "usage.png").read_bytes()).decode()
            pictures[picture.run.name] = f"data:image/png;base64,{png}"
        rows.append(
            {
                "label": group[0].row.label,
                "model": model.name,
                "lambda": f"{model.cost_per_sample:g}" if POLICIES[model.policy].learned else "none",
                "cell": CELLS[model.cell].label,
                "colour": colour,
                "epochs": [sum(one["epochs"][k] for one in of_row) for k in (0, 1)],
                "score": mean_and_deviation(line, score),
                "updates": mean_and_deviation(line, updates),
                "paper": [mean_and_deviation(line, f"published_{name}") for name in (score, updates)],
                "curves": of_row_curves(group[0].run, of_group, tuple(shown), used, record, len(groups)),
            }
        )
    counts = {state: sum(one["state"] == state for one in runs) for state in reversed(STATES.values())}
    return {
        "name": digest(planned),
        "title": experiment.title,
        "command": command,
        "note": planned[0].run.profile.get("note", ""),
        "score": METRICS[score].heading,
        "updates": METRICS[updates].heading,
        "metrics": shown,
        "seconds": SECONDS[used] if used else "seconds, which not every run has of its own",
        "tables": [tabular(read(experiment, numbers)) for read in (table.layout, table.verdicts)],
        "rows": rows,
        "runs": runs,
        "pictures": pictures,
        "counts": {state: count for state, count in counts.items() if count or state == "complete"},
        "epochs": [sum(row["epochs"][k] for row in rows) for k in (0, 1)],
    }


def progress(one: PlannedRun, row: int, locked: set[int], tell: Tell) -> dict[str, Any]:
    """How far a run is, when it last moved, and what it came to."""
    folder, planned = one.folder, one.run.training.epochs
    state = folder.state(locked)
    if damage := folder.damage:
        tell(damage)
    epochs, moved = planned, ""
    results: list[float | None] = [None, None]
    if state == "complete":
        record = folder.record()
        results = [short(record["best"]["test"][name]) for name in (SCORES[record["task"]], "state_updates")]
    else:
        epochs = folder.epochs_done()
        with suppress(FileNotFoundError):
            moved = datetime.fromtimestamp(folder.metrics_file.stat().st_mtime).strftime("%d %b %H:%M")
    reason = folder.failure or "" if state == "failed" else ""
    names = {"name": one.run.name, "row": row, "seed": one.run.seed, "state": STATES[state], "reason": reason}
    return names | {"epochs": [epochs, planned], "moved": moved, "results": results}


def mean_and_deviation(line: pd.Series, metric: str) -> list[float] | None:
    """[mean, standard deviation or 0], or None where nothing was measured."""
    mean, deviation = line.get(f"{metric}_mean"), line.get(f"{metric}_std")
    return None if pd.isna(mean) else [short(mean), 0.0 if pd.isna(deviation) else short(deviation)]


def short(number: float) -> float:
    return float(f"{number:.5g}")


def listed(values: np.ndarray) -> list[float | None]:
    """As JSON has them: null for what is not finite."""
    return [short(value) if np.isfinite(value) else None for value in values.tolist()]


def curves_of(group: Sequence[PlannedRun], tell: Tell) -> Curves:
    """Of the runs that have metrics.csv."""
    found = []
    for folder in (one.folder for one in group):
        if folder.metrics_file.exists():
            try:
                found.append(read_curves(folder.metrics_file, folder.record() if folder.complete else None))
            except ConfigError as error:
                tell(str(error))
    return Curves.of(found)


def thinned(epochs: np.ndarray, most: int) -> np.ndarray:
    """Indices of so many at most, the last one's among them."""
    every = -(-len(epochs) // most) or 1
    return np.arange(len(epochs))[::-every][::-1]


def of_row_curves(
    run: RunConfig, curves: Curves, shown: Sequence[str], used: str | None, record: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    """Of a row's runs: epochs, steps and seconds (None where they are not known); mean, least and largest of metrics.

    Args:
        run: one of them.
        used: the clock.
        record: of a run of the same data.
        rows: of the table; the more, the thinner are curves.
    """
    kept = thinned(curves.epochs, max(POINTS * 200 // max(rows, 200), 12))
    epochs, steps = curves.epochs[kept], None
    with suppress(KeyError):  # a made-up record
        steps = steps_per_epoch({"config": run.identity, "examples": record["examples"]}) * epochs
    return {
        "epoch": epochs.tolist(),
        "steps": None if steps is None else steps.tolist(),
        "seconds": listed(curves.seconds(used)[kept]) if used else None,
    } | {name: [listed(line[kept]) for line in spread(curves[name])] for name in shown if curves[name].size}


def detail(one: PlannedRun, tell: Tell) -> dict[str, Any]:
    """All of one run: settings, record, metrics by epoch."""
    curves = curves_of([one], tell)
    kept = thinned(curves.epochs, 4 * POINTS)
    record = one.folder.record() if one.folder.complete else {}
    results = {key: value for key, value in record.items() if key not in ("name", "config")}
    if record and not has_own_time(record):
        times = {"seconds", "examples_per_second"} & results.keys()
        results |= {key: f"{results[key]:.6g} (of several runs at once)" for key in times}
    return {
        "config": flat(one.run.identity),
        "record": flat(results),
        "curves": {"epoch": curves.epochs[kept].tolist()}
        | {name: listed(values[0, kept]) for name, values in curves.columns.items()},
        "picture": (one.folder.path / "usage.png").exists(),
    }


def flat(settings: dict[str, Any]) -> dict[Any, Any]:
    """{"model": {"cell": "lstm"}} as {"model.cell": "lstm"}."""
    return pd.json_normalize(settings).to_dict("records")[0]


def runs_of(output: Path) -> dict[str, PlannedRun]:
    """Every run of an output folder, by its name."""
    return {one.run.name: one for _, _, runs in sweeps(output, lambda _: None) for one in runs}


def html(output: Path, tell: Tell, claims: Sequence[dict[str, Any]] = (), served: bool = False) -> str:
    """The page of an output folder; damaged files are left out, and told.

    Args:
        served: asks a server for news and for single runs (skiprnn.dashboard --serve), and does not hold these itself.

    Raises:
        ConfigError: there are no runs in it.
    """
    shown = content(output, tell, claims)
    if not served:
        runs = islice(runs_of(output).items(), HELD)
        shown["details"] = {name: detail(one, lambda _: None) for name, one in runs}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("skiprnn.views", ""), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # in the order that they have
    return environment.get_template("page.html").render(
        content=shown,
        served=served,
        used=style.USED,
        skipped=style.SKIPPED,
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace("</script", r"<\/script"),
    )

"""A sweep from end to end: plan, estimate, launch what is incomplete, report failures, make the table."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from hydra.core.utils import JobStatus
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from skiprnn import experiments, tables, train
from skiprnn.experiments import PlannedRun
from skiprnn.runs import duration


def run(
    grid: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], DictConfig],
    launch: Callable[[list[list[str]]], Sequence[Any]],
    workers: int = 1,
) -> None:
    """Carry out a sweep; exits with status 1 if a run failed, after all others were tried.

    Args:
        grid: combinations of overrides, one job each (one per row and seed for an experiment).
        compose: Hydra's composition.
        launch: Hydra's launcher: jobs' overrides -> their JobReturns.
        workers: jobs that the launcher runs at once, for the estimate.
    """
    train.quieten()
    try:
        name = compose(grid[0])["experiment"]
        experiment = experiments.load(name) if name else None
        planned = experiments.plan(experiment, grid, compose)
        todo = [one for one in planned if not one.folder.complete]
        seconds = tell_plan(planned, todo, workers)
        todo.sort(key=lambda one: -seconds[one.row.label])  # the longest first: none is left alone at the end
    except train.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    packs = packed(todo)
    returns = launch([overrides(pack) for pack in packs]) if packs else []
    failures = [
        f"  {', '.join(one.run.name for one in pack)}: {result._return_value}"
        for pack, result in zip(packs, returns, strict=True)
        if result.status != JobStatus.COMPLETED
    ]
    if experiment:
        print()
        print(tables.publish(experiment, planned))
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} of {len(planned)} runs failed:", *failures]))


def packed(todo: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs of each job: seeds of a row side by side, as many as `pack` says or, on a GPU, all of them."""
    jobs: list[list[PlannedRun]] = []
    for one in todo:
        size = one.run.pack or (len(todo) if train.device_of(one.run).type == "cuda" else 1)
        for job in jobs:
            if len(job) < size and replace(job[0].run, seed=one.run.seed) == one.run:
                job.append(one)
                break
        else:
            jobs.append([one])
    return jobs


def overrides(pack: Sequence[PlannedRun]) -> list[str]:
    """What makes a job of these runs."""
    if len(pack) == 1:
        return [*pack[0].overrides, "pack=1"]
    seeds = ",".join(str(one.run.seed) for one in pack)
    return [*pack[0].overrides, f"pack={len(pack)}", f"seeds=[{seeds}]"]


def tell_plan(planned: Sequence[PlannedRun], todo: Sequence[PlannedRun], workers: int) -> dict[str, float]:
    """Print rows, seeds, epochs, the estimated time and where results go, before anything long starts.

    Returns:
        The estimated seconds of an epoch of each row that has something to do, by its label.
    """
    console = Console()
    table = Table("row", "seeds", "epochs", "complete", "estimate")
    total, measured = 0.0, {}
    incomplete = {one.run.name for one in todo}
    with console.status("measuring a few steps of each row"):
        for label, group in groupby(planned, lambda one: one.row.label):
            runs = list(group)
            left = [one for one in runs if one.run.name in incomplete]
            epochs = sum(one.run.training.epochs - one.folder.epochs_done() for one in left)
            measured[label] = train.seconds_per_epoch(left[0].run) if left else 0.0
            seconds = epochs * measured[label]
            total += seconds
            table.add_row(
                label or f"{runs[0].run.row} on {runs[0].run.data['name']}",
                ", ".join(str(one.run.seed) for one in runs),
                str(runs[0].run.training.epochs),
                f"{len(runs) - len(left)} / {len(runs)}",
                duration(seconds) if left else "",
            )
    console.print(table)
    at_once = f", {workers} at once" if workers > 1 else ""
    estimate = f" about {duration(total / workers)}" if todo else " nothing to do"
    console.print(
        f"{len(todo)} of {len(planned)} runs to do{at_once}:{estimate}; run folders in {planned[0].run.output}/. "
        "Interrupted, the same command continues.",
        soft_wrap=True,
    )
    return measured

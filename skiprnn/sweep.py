"""A sweep from end to end: plan, estimate, launch what is incomplete, report failures, make the table.

python -m skiprnn.sweep cpu [overrides]: every table that is published, under the profile of this name of its data set.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

from hydra.core.utils import JobStatus
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from skiprnn import train
from skiprnn.data.base import DataError
from skiprnn.papers import experiments, plan
from skiprnn.papers.plan import PlannedRun
from skiprnn.papers.table import publish
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import duration

ROWS_TOLD = 40  # more of them are summed up by data set and model
ATTEMPTS = 3  # launches that bring no run further, before a sweep gives up


def run(
    grid: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], DictConfig],
    launch: Callable[[list[list[str]]], Sequence[Any]],
    workers: int = 1,
    command: str = "",
    here: bool = True,
    gpu: bool = False,
) -> None:
    """Carry out a sweep; exits with status 1 if a run failed, after all others were tried.

    Args:
        grid: combinations of overrides, one job each (one per row and seed for an experiment).
        compose: Hydra's composition.
        launch: Hydra's launcher: jobs' overrides -> their JobReturns.
        workers: jobs that the launcher runs at once, for the estimate.
        command: the overrides as typed.
        here: the runs will be on this machine, so that an epoch can be timed on it.
        gpu: jobs have a GPU.
    """
    train.quieten()
    try:
        name = compose(grid[0])["experiment"]
        experiment = experiments.load(name) if name else None
        planned = plan.runs(experiment, grid, compose)
        todo = [one for one in planned if not one.folder.complete]
        plan.save_plan(experiment, command, planned)
        prepare(todo)
        seconds = tell_plan(planned, todo, workers, here)
        # the longest first: none is left alone at the end
        todo.sort(key=lambda one: -seconds.get(kind_of(one), 0) * (one.run.training.epochs - one.folder.epochs_done()))
        failures = launch_all(todo, launch, gpu)
    except train.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(train.INTERRUPTED)
    if experiment:
        print()
        print(publish(experiment, planned))
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} of {len(planned)} runs failed:", *failures]))


def launch_all(
    todo: Sequence[PlannedRun], launch: Callable[[list[list[str]]], Sequence[Any]], gpu: bool = False
) -> list[str]:
    """Launch runs; returns a line for each that failed.

    A launcher gives up all its runs when one of its processes is killed. It is then started anew with what is left,
    where each run continues.
    """
    attempts = 0
    while todo:
        before = {one.run.name: one.folder.epochs_done() for one in todo}
        try:
            packs = packed(todo, gpu)
            returns = launch([overrides(pack) for pack in packs])
        except BrokenExecutor as error:
            gained = any(one.folder.complete or one.folder.epochs_done() > before[one.run.name] for one in todo)
            todo = [one for one in todo if not one.folder.complete]
            attempts = 0 if gained else attempts + 1
            if attempts == ATTEMPTS:
                return [f"  {one.run.name}: {str(error).splitlines()[0]}" for one in todo]
            print(f"a process was killed; {len(todo)} runs are left, and continue", flush=True)
            continue
        return [
            f"  {', '.join(one.run.name for one in pack)}: {result._return_value}"
            for pack, result in zip(packs, returns, strict=True)
            if result.status != JobStatus.COMPLETED
        ]
    return []


def prepare(todo: Sequence[PlannedRun]) -> None:
    """Fetch the data once, before many processes ask for them, perhaps where there is no internet."""
    for run in {repr((one.run.data, one.run.data_root)): one.run for one in todo}.values():
        train.make_data(run).prepare()


def kind_of(one: PlannedRun) -> str:
    """What the time of a run depends on, λ and p_skip apart."""
    model = replace(one.run.model, cost_per_sample=0.0, p_skip=None if one.run.model.p_skip is None else 0.5)
    return repr((one.run.data, model, one.run.training))


def packed(todo: Sequence[PlannedRun], gpu: bool) -> list[list[PlannedRun]]:
    """The runs of each job: seeds of a row side by side, as many as `pack` says or, on a GPU, all of them.

    A process has one wandb page at a time: runs with a page are alone.
    """
    jobs: list[list[PlannedRun]] = []
    latest: dict[str, list[PlannedRun]] = {}  # the job of each row that may take another run
    for one in todo:
        alone = "wandb" in one.run.logger
        size = 1 if alone else one.run.pack or (len(todo) if gpu and one.run.device != "cpu" else 1)
        row = repr(replace(one.run, seed=0))
        if row not in latest or len(latest[row]) >= size:
            latest[row] = []
            jobs.append(latest[row])
        latest[row].append(one)
    return jobs


def overrides(pack: Sequence[PlannedRun]) -> list[str]:
    """What makes a job of these runs."""
    if len(pack) == 1:
        return [*pack[0].overrides, "pack=1"]
    seeds = ",".join(str(one.run.seed) for one in pack)
    return [*pack[0].overrides, f"pack={len(pack)}", f"seeds=[{seeds}]"]


def tell_plan(planned: Sequence[PlannedRun], todo: Sequence[PlannedRun], workers: int, here: bool) -> dict[str, float]:
    """Print rows, seeds, epochs, the estimated time and where results go, before anything long starts.

    Returns:
        The estimated seconds of an epoch of every kind of run that is to be done; nothing unless it is done here.
    """
    console = Console()
    incomplete = {one.run.name for one in todo}
    rows = [list(group) for _, group in groupby(planned, lambda one: one.row.label)]
    if len(rows) > ROWS_TOLD:
        rows = [list(group) for _, group in groupby(sorted(planned, key=kind_of), kind_of)]
    table = Table("row", "seeds", "epochs", "complete", *(["estimate"] if here else []))
    alike: dict[str, list[RunConfig]] = {}
    for one in todo:
        alike.setdefault(kind_of(one), []).append(one.run)
    measured: dict[str, float] = {}
    total = 0.0
    with console.status("measuring a few steps of each row"):
        for kind, runs in alike.items() if here else ():
            measured[kind] = train.seconds_per_epoch(runs[len(runs) // 2])  # once for all λ and p_skip, in the middle
    for group in rows:
        left = [one for one in group if one.run.name in incomplete]
        epochs = sum(one.run.training.epochs - one.folder.epochs_done() for one in left)
        seconds = epochs * measured.get(kind_of(group[0]), 0.0)
        total += seconds
        model, data = group[0].run.model.name, group[0].run.data["name"]
        labels, seeds = {one.row.label for one in group}, sorted({one.run.seed for one in group})
        table.add_row(
            group[0].row.label or f"{group[0].run.row} on {data}"
            if len(labels) == 1
            else f"{model} on {data}, {len(labels)} settings",
            ", ".join(map(str, seeds)),
            str(group[0].run.training.epochs),
            f"{len(group) - len(left)} / {len(group)}",
            *([duration(seconds) if left else ""] if here else []),
        )
    console.print(table)
    at_once = f", {workers} at once" if workers > 1 else ""
    estimate = f": about {duration(total / min(workers, len(todo)))}" if todo and here else ""
    output = planned[0].run.output
    console.print(
        f"{len(todo)} of {len(planned)} runs to do{at_once if todo else ''}{estimate}; run folders in {output}/. "
        f"Interrupted, the same command continues; python -m skiprnn.dashboard {output} shows how far it is.",
        soft_wrap=True,
    )
    return measured


def main(arguments: Sequence[str]) -> None:
    """Run every published table whose data can be had, each in a process of its own; then say what was left out.

    Data are fetched first, so that what is missing shows before anything long starts. Exits with status 1 if a table
    failed; one that was left out for want of data has not.
    """
    if not arguments or "=" in arguments[0]:
        sys.exit("error: which profile? python -m skiprnn.sweep paper|cpu|smoke [overrides]")
    profile, *overrides = arguments
    ready, problems, status = {}, [], 0
    for experiment in experiments.published():
        name, data = experiment.name, experiment.data
        command = [f"experiment={name}", f"data={data}", f"profile={data}/{profile}", *overrides]
        try:
            planned = plan.requested(command)[1]
            prepare(planned)
            ready[name] = command
        except DataError as error:
            problems.append(f"{name} was left out: {error}")
            print(problems[-1], flush=True)
        except ConfigError as error:
            sys.exit(f"error: {name}: {error}")
    for name, command in ready.items():
        print(f"\n{name}:", " ".join(command), flush=True)
        if subprocess.run([sys.executable, "-m", "skiprnn.train", "-m", *command], check=False).returncode:
            problems.append(f"{name} failed, see above")
            status = 1
    print("\n".join(["", f"{len(ready)} of the papers' {len(experiments.published())} tables were run", *problems]))
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])

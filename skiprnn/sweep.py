"""A sweep from end to end: plan, estimate, launch what is incomplete, report failures, make the table.

python -m skiprnn.sweep cpu [overrides]: every table that is published, under the profile of this name of its data set.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from skiprnn import tables, train
from skiprnn.data.base import DataError
from skiprnn.papers import experiments
from skiprnn.papers.experiments import PlannedRun
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import duration
from skiprnn.training.workers import Place, packed

ROWS_TOLD = 40  # more of them are summed up by data set and model


def run(
    grid: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], DictConfig],
    find_place: Callable[[Path], Place],
    command: str = "",
) -> None:
    """Carry out a sweep; exits with status 1 if a run failed, after all others were tried.

    Args:
        grid: combinations of overrides, one job each (one per row and seed for an experiment).
        compose: Hydra's composition.
        find_place: where runs are trained whose folders are in a folder.
        command: the overrides as typed.
    """
    train.quieten()
    try:
        name = compose(grid[0])["experiment"]
        experiment = experiments.load(name) if name else None
        planned = experiments.plan(experiment, grid, compose)
        place = find_place(Path(planned[0].run.output))
        todo = [one for one in planned if not one.folder.complete]
        experiments.save_plan(experiment, command, planned)
        prepare(todo)
        seconds = tell_plan(planned, todo, place)
        # the longest first: none is left alone at the end
        todo.sort(key=lambda one: -seconds.get(kind_of(one), 0) * (one.run.training.epochs - one.folder.epochs_done()))
        failures = place.train(packed([one.run for one in todo], place.gpu))
    except train.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(train.INTERRUPTED)
    if failures is None:
        return
    if experiment:
        print()
        print(tables.publish(experiment, planned))
    if failures:
        reasons = [f"  {name}: {reason}" for name, reason in failures.items()]
        sys.exit("\n".join([f"error: {len(failures)} of {len(planned)} runs failed:", *reasons]))


def prepare(todo: Sequence[PlannedRun]) -> None:
    """Fetch the data once, before many processes ask for them, perhaps where there is no internet."""
    for run in {repr((one.run.data, one.run.data_root)): one.run for one in todo}.values():
        train.make_data(run).prepare()


def kind_of(one: PlannedRun) -> str:
    """What the time of a run depends on, λ and p_skip apart."""
    model = replace(one.run.model, cost_per_sample=0.0, p_skip=None if one.run.model.p_skip is None else 0.5)
    return repr((one.run.data, model, one.run.training))


def tell_plan(planned: Sequence[PlannedRun], todo: Sequence[PlannedRun], place: Place) -> dict[str, float]:
    """Print rows, seeds, epochs, the estimated time and where results go, before anything long starts.

    Returns:
        The estimated seconds of an epoch of every kind of run that is to be done; nothing unless it is done here.
    """
    console = Console()
    incomplete = {one.run.name for one in todo}
    rows = [list(group) for _, group in groupby(planned, lambda one: one.row.label)]
    if len(rows) > ROWS_TOLD:
        rows = [list(group) for _, group in groupby(sorted(planned, key=kind_of), kind_of)]
    table = Table("row", "seeds", "epochs", "complete", *(["estimate"] if place.here else []))
    alike: dict[str, list[RunConfig]] = {}
    for one in todo:
        alike.setdefault(kind_of(one), []).append(one.run)
    measured: dict[str, float] = {}
    total = 0.0
    with console.status("measuring a few steps of each row"):
        for kind, runs in alike.items() if place.here else ():
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
            *([duration(seconds) if left else ""] if place.here else []),
        )
    console.print(table)
    at_once = f", {place.workers} at once" if place.workers > 1 else ""
    estimate = f": about {duration(total / min(place.workers, len(todo)))}" if todo and place.here else ""
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
            planned = experiments.requested(command)[1]
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

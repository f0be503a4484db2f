"""A sweep from end to end: plan, estimate, launch what is incomplete, report failures, make the table."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean

import torch
from joblib import cpu_count
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from skiprnn.papers import experiments, plan, table
from skiprnn.papers.experiments import Experiment
from skiprnn.papers.plan import PlannedRun
from skiprnn.training import job, setup
from skiprnn.training.config import ConfigError, RunConfig, packaged
from skiprnn.training.estimate import seconds_per_epoch
from skiprnn.training.job import Draw
from skiprnn.training.timing import duration
from skiprnn.training.workers import Place, packed

ROWS_TOLD = 40  # more of them are summed up by data set and model
WORTH_IT, FASTER = 60.0, 1.5  # seconds of a sweep, and times as fast: less is not worth a word


def run(
    grid: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], DictConfig],
    find_place: Callable[[Path], Place],
    command: str,
    draw: Draw,
    draw_figures: Callable[[Experiment, list[PlannedRun]], str],
) -> None:
    """Carry out a sweep; exits with status 1 if a run failed, after all others were tried.

    A run that diverged is done: it is told, in every sweep, and not repeated.

    Args:
        grid: combinations of overrides, one run each (one per row and seed for an experiment).
        compose: Hydra's composition.
        find_place: where to train runs whose folders are in a folder.
        command: the overrides as typed.
        draw: the picture of what a network uses, for the run folder.
        draw_figures: of complete runs, beside their table; says what they are.
    """
    job.quieten()
    try:
        name = compose(grid[0] if grid else [])["experiment"]
        experiment = experiments.load(name) if name else None
        planned = plan.runs(experiment, grid, compose)
        place = find_place(Path(planned[0].run.output))
        todo = [one for one in planned if not one.folder.complete and not one.folder.diverged]
        prepare(todo)
        seconds = tell_plan(planned, todo, place)
        plan.save_plan(experiment, command, planned)  # what cannot work was refused, and leaves nothing
        if len(todo) > 1 and place.here and not place.gpu and place.workers == 1:
            tell_processes(todo, seconds)
        if experiment and todo and place.here and not place.gpu:
            tell_other_profiles(experiment, grid, compose, todo, seconds, place.workers)
        # the longest first: none is left alone at the end
        todo.sort(key=lambda one: -seconds.get(kind_of(one), 0) * (one.run.training.epochs - one.folder.epochs_done()))
        reasons = place.train(packed([one.run for one in todo], place.gpu), draw)
    except job.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(job.INTERRUPTED)
    if reasons is None:
        return
    for one, runs in plan.apart(experiment or plan.plain(command), planned):
        print()
        print(table.publish(one, runs))
        if any(run.folder.complete for run in runs):
            print(draw_figures(one, runs))
    again = shlex.join(one for one in command.split() if not one.startswith(("hydra/", "hydra.")))
    print(
        f"Next: python -m skiprnn.dashboard {planned[0].run.output}, each run beside the others; "
        f"python -m skiprnn.figures {again}, also what the best runs read"
    )
    failures = [
        f"  {one.run.name}: {reasons.get(one.run.name) or one.folder.failure}"
        f"{f'; delete {one.folder.failure_file} to try again' if one.folder.diverged else ''}"
        for one in planned
        if not one.folder.complete
    ]
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} of {len(planned)} runs failed:", *failures]))


def prepare(todo: Sequence[PlannedRun]) -> None:
    """Refuse loggers that are none; fetch the data once, before many processes ask for them, perhaps where there is no
    internet."""
    for run in {repr((one.run.data, one.run.data_root)): one.run for one in todo}.values():
        job.loggers_of(run)
        setup.make_data(run).prepare()


def kind_of(one: PlannedRun) -> str:
    """What the time of a run depends on."""
    return repr((network_of(one), one.run.training))


def network_of(one: PlannedRun) -> str:
    """Of it, the data and the model; λ and p_skip apart."""
    model = replace(one.run.model, cost_per_sample=0.0, p_skip=None if one.run.model.p_skip is None else 0.5)
    return repr((one.run.data, model))


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
    shown = Table("row", "seeds", "epochs", "complete", *(["estimate"] if place.here else []))
    alike: dict[str, list[RunConfig]] = {}
    for one in todo:
        alike.setdefault(kind_of(one), []).append(one.run)
    measured: dict[str, float] = {}
    total = 0.0
    with console.status("measuring a few steps of each row"):
        for kind, runs in alike.items() if place.here else ():
            measured[kind] = seconds_per_epoch(runs[len(runs) // 2])  # once for all λ and p_skip, in the middle
    for group in rows:
        left = [one for one in group if one.run.name in incomplete]
        epochs = sum(one.run.training.epochs - one.folder.epochs_done() for one in left)
        seconds = epochs * measured.get(kind_of(group[0]), 0.0)
        total += seconds
        diverged = sum(one.folder.diverged for one in group)
        model, data = group[0].run.model.name, group[0].run.data["name"]
        labels, seeds = {one.row.label for one in group}, sorted({one.run.seed for one in group})
        shown.add_row(
            group[0].row.label or f"{group[0].run.row} on {data}"
            if len(labels) == 1
            else f"{model} on {data}, {len(labels)} settings",
            ", ".join(map(str, seeds)),
            str(group[0].run.training.epochs),
            f"{len(group) - len(left) - diverged} / {len(group)}{f', {diverged} diverged' if diverged else ''}",
            *([duration(seconds) if left else ""] if place.here else []),
        )
    console.print(shown)
    at_once = f", {place.workers} at once" if place.workers > 1 else ""
    estimate = f": about {duration(total / min(place.workers, len(todo)))}" if todo and place.here else ""
    output = planned[0].run.output
    console.print(
        f"{len(todo)} of {len(planned)} runs to do{at_once if todo else ''}{estimate}; run folders in {output}/. "
        f"Interrupted, the same command continues; python -m skiprnn.dashboard {output} shows how far it is.",
        soft_wrap=True,
    )
    return measured


def tell_processes(todo: Sequence[PlannedRun], seconds: Mapping[str, float]) -> None:
    """Say how much sooner a process per core would be done, where that is worth it."""
    total = sum(seconds[kind_of(one)] * (one.run.training.epochs - one.folder.epochs_done()) for one in todo)
    workers = min(cpu_count(), len(todo))
    if total < WORTH_IT or workers == 1:
        return
    threads = torch.get_num_threads()
    with Console().status("measuring a few steps on one thread"):
        alone = seconds_per_epoch(replace(todo[0].run, threads=1))
    torch.set_num_threads(threads)
    gain = workers * seconds[kind_of(todo[0])] / alone
    if gain >= FASTER:
        Console().print(
            f"With hydra/launcher=processes threads=1, {workers} at once, about {duration(total / gain)}: "
            f"{gain:.1f} times as fast.",
            soft_wrap=True,
        )


def tell_other_profiles(
    experiment: Experiment,
    grid: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], DictConfig],
    todo: Sequence[PlannedRun],
    seconds: Mapping[str, float],
    workers: int,
) -> None:
    """Print what the data's other profiles would take on this machine: one run is measured at each.

    Args:
        todo: the runs of this profile.
        seconds: what tell_plan gave: of an epoch of each kind of them.
    """
    console, first = Console(), todo[0]
    here = {network_of(one): seconds[kind_of(one)] for one in todo}
    folder = packaged("conf") / "profile" / first.run.data["name"]
    told = []
    for name in sorted({file.stem for file in folder.glob("*.yaml")} - {first.run.profile["name"]}):
        profile = f"profile={folder.name}/{name}"
        given = [[*(one for one in given if not one.startswith("profile=")), profile] for given in grid]
        try:
            other = plan.runs(experiment, given, compose)
        except ConfigError:  # what was given besides does not go with this one
            continue
        like_first = next((one.run for one in other if network_of(one) == network_of(first)), None)
        if like_first is None:
            continue
        with console.status(f"measuring a few steps at {profile}"):
            scale = seconds_per_epoch(like_first) / here[network_of(first)]
        epochs = ((one.run.training.epochs, here.get(network_of(one), mean(here.values()))) for one in other)
        total = sum(number * scale * epoch for number, epoch in epochs) / min(workers, len(other))
        made = like_first.profile.get("published")
        told.append(f"{profile} about {duration(total)}{f' (as {made})' if made else ''}")
    if told:
        console.print(f"On this machine, all runs of other profiles: {', '.join(told)}.", soft_wrap=True)

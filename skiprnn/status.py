"""How far sweeps are: what is queued, running, complete, failed; from the queue and the run folders.

python -m skiprnn.status [outputs]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from skiprnn.papers.plan import PlannedRun, saved_plans
from skiprnn.training.cluster import submissions
from skiprnn.training.command_line import arguments_of
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import locked_files

STATES = ("complete", "running", "queued", "stopped", "failed", "waiting")
TOLD = 30  # runs of a state that are named


def in_jobs(output: Path) -> dict[str, tuple[str, str]]:
    """The runs that jobs have: name -> state, and the job with what the queue says of it.

    Raises:
        ConfigError: the queue does not answer.
    """
    jobs = submissions.submitted((output / "submitit").resolve())
    known = submissions.states(jobs)
    runs: dict[str, tuple[str, str]] = {}
    for job in jobs:
        state, reason = known[job.id]
        if state in ("RUNNING", "COMPLETING"):
            said = "running", f"job {job.id}"
        elif state not in submissions.OVER:
            said = "queued", f"job {job.id}, {state.lower()}: {reason}"
        else:
            continue
        runs |= {name: said for pack in job.packs for name in pack}
    return runs


def state_of(one: PlannedRun, jobs: Mapping[str, tuple[str, str]], locked: set[int]) -> tuple[str, str]:
    """One of STATES, and what there is to say of it."""
    folder = one.folder
    state = folder.state(locked)
    if state == "complete":
        return state, ""
    done = folder.epochs_done()
    how_far = f"epoch {done} of {one.run.training.epochs}"
    if one.run.name in jobs:
        state, job = jobs[one.run.name]
        return state, f"{how_far}, {job}" if done else job
    return state, {"running": how_far, "stopped": how_far, "failed": folder.failure or ""}.get(state, "")


def report(output: Path) -> str:
    """How far the sweeps into an output folder are, the latest last.

    Raises:
        ConfigError: there are none.
    """
    lines: list[str] = []
    plans = saved_plans(output, lines.append)
    if not plans:
        raise ConfigError("\n".join([*lines, f"{output}: no sweeps here; give the folder that was output= of one"]))
    jobs: dict[str, tuple[str, str]] = {}
    try:
        jobs = in_jobs(output)
    except ConfigError as error:
        lines.append(f"what is queued is not known: {error}")
    locked = locked_files()
    for plan in reversed(plans):
        states = {one.run.name: state_of(one, jobs, locked) for one in plan.planned}
        counts = Counter(state for state, _ in states.values())
        told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        lines += [f"{plan.experiment.title}: {told}", *([f"  {plan.command}"] if plan.experiment.name else [])]
        for state in ("running", "queued", "stopped", "failed"):
            names = [name for name, (found, _) in states.items() if found == state]
            lines += [f"  {state:8} {name}  {states[name][1]}" for name in names[:TOLD]]
            lines += [f"  {state:8} {len(names) - TOLD} more"] if len(names) > TOLD else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="skiprnn status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs"), help="folder of run folders")
    try:
        print(report(arguments_of(parser, arguments).output))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

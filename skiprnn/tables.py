"""Run records -> a table like the paper's: Markdown, CSV and LaTeX, the published numbers beside ours.

    python -m skiprnn.tables experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]
    python -m skiprnn.tables model=skip_lstm,skip_gru model.cost_per_sample=0,1e-4 seed=0,1,2

It takes what a sweep over these runs takes.
"""

import shlex
import sys
from collections.abc import Sequence

from skiprnn.papers import plan, table
from skiprnn.training.config import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Render the table of an experiment or a grid from the records that exist."""
    try:
        experiment, planned, folder = plan.requested(arguments)
        if not experiment.name and not any(one.folder.complete for one in planned):
            none = f"output={planned[0].run.output}: none of the {len(planned)} runs is complete"
            raise ConfigError(f"{none}; a table of the papers has a name, experiment=NAME")
        for one, runs in plan.apart(experiment, planned, folder):
            print(table.publish(one, runs, folder, arguments))
        if damages := [damage for one in planned if (damage := one.folder.damage)]:
            raise ConfigError("; ".join(damages))
        complete = [one.folder.complete for one in planned]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    steps = [f"figures {shlex.join(arguments)}"] if any(complete) else []
    again = shlex.join(one for one in arguments if not one.startswith("publish="))
    steps += [] if all(complete) else [f"train -m {again}"]
    print("Next:", "; ".join(f"python -m skiprnn.{step}" for step in steps))


if __name__ == "__main__":
    main(sys.argv[1:])

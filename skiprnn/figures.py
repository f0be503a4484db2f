"""The figures of an experiment or a grid, from the records and checkpoints that exist: see skiprnn.views.figures.

    python -m skiprnn.figures experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]
    python -m skiprnn.figures model=skip_lstm,skip_gru model.cost_per_sample=0,1e-4 seed=0,1,2

It takes what a sweep over these runs takes.
"""

import sys
from collections.abc import Sequence

from skiprnn.papers import plan
from skiprnn.training.config import ConfigError
from skiprnn.views import figures


def main(arguments: Sequence[str]) -> None:
    """Draw them."""
    try:
        experiment, planned, folder = plan.requested(arguments)
        for one, runs in plan.apart(experiment, planned, folder):
            print(figures.publish(one, runs, folder))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"Next: python -m skiprnn.dashboard {planned[0].run.output}")


if __name__ == "__main__":
    main(sys.argv[1:])

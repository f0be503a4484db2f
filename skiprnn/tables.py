"""Run records -> a table like the paper's: Markdown, CSV and LaTeX, the published numbers beside ours.

python -m skiprnn.tables experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]
"""

import sys
from collections.abc import Sequence

from skiprnn.papers import plan, table
from skiprnn.training.config import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Render the table of an experiment from the records that exist."""
    try:
        experiment, planned, folder = plan.requested(arguments)
        if not experiment:
            raise ConfigError("experiment=NAME is missing: which table?")
        print(table.publish(experiment, planned, folder, arguments))
        if damages := [damage for one in planned if (damage := one.folder.damage)]:
            raise ConfigError("; ".join(damages))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

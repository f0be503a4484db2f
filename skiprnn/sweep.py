"""Every table that is published: python -m skiprnn.sweep cpu [overrides].

Each under the profile of this name of its data set, as far as the data can be had.
"""

import subprocess
import sys
from collections.abc import Sequence

from skiprnn.data.base import DataError
from skiprnn.papers import experiments, plan, sweep
from skiprnn.training.config import ConfigError


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
            sweep.prepare(planned)
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

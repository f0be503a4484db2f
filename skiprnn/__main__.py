"""The commands: skiprnn NAME [arguments] is python -m skiprnn.NAME [arguments]."""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "train": "train one run, or with -m many: a grid, or the rows of an experiment",
    "sweep": "every table of the papers that the data at hand allow",
    "status": "how far sweeps are: queued, running, complete, failed",
    "tables": "the table of an experiment, from its complete runs",
    "figures": "its figures",
    "claims": "what the papers claim, and what published records say of it",
    "evaluate": "measure a checkpoint; or many, beside their records",
    "publish": "trained weights for others, with model cards",
    "dashboard": "one HTML page: how far all sweeps are",
    "sitting": "a sweep on a GPU that is to be had for minutes at a time",
    "bench": "how long the engines take, beside torch.nn",
}


def main() -> None:
    """Run the command that the command line names; exits with status 1 if there is none."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("skiprnn COMMAND [arguments]\n", *(f"  {name:<12}{does}" for name, does in COMMANDS.items()), sep="\n")
        return
    if name not in COMMANDS:
        sys.exit(f"error: no command {name}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"skiprnn {name}", *arguments]
    sys.path.append(str(Path.cwd()))  # for a data class that is the user's own, as python -m does
    try:
        command = import_module(f"skiprnn.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("skiprnn"):
            raise
        sys.exit(f"error: skiprnn {name} needs {error.name}: pip install 'skiprnn[experiments]'")
    if name == "train":  # which Hydra gives sys.argv
        command.main()
    else:
        command.main(arguments)


if __name__ == "__main__":
    main()

"""The commands: skiprnn NAME [arguments] is python -m skiprnn.NAME [arguments]."""

import os
import re
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
CONFIGURED = ("train", "tables", "figures", "publish")  # take the settings of conf/


def complete(arguments: list[str]) -> None:
    """Hydra's completion for shells: -sc install=bash prints what bash has to run, -sc query=bash what may come next in
    its line COMP_LINE, as Hydra knows it of a command without a name.
    """
    import hydra  # skiprnn[experiments]

    from skiprnn.training.config import packaged

    line = re.fullmatch(r"\s*(\S+)\s+(\S+)\s(.*)", os.environ.get("COMP_LINE", ""))
    if " ".join(arguments).startswith("query="):
        if not line or line[2] not in CONFIGURED:
            print("" if line else "\n".join(COMMANDS))
            return
        os.environ["COMP_LINE"] = f"{line[1]} {line[3].replace('--detach ', '')}"
    sys.argv = ["skiprnn", "-sc", *arguments]
    hydra.main(version_base="1.3", config_path=str(packaged("conf")), config_name="config")(lambda _: None)()


def main() -> None:
    """Run the command that the command line names; exits with status 1 if there is none."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("skiprnn COMMAND [arguments]\n", *(f"  {name:<12}{does}" for name, does in COMMANDS.items()), sep="\n")
        return
    if name not in (*COMMANDS, "-sc"):
        sys.exit(f"error: no command {name}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"skiprnn {name}", *arguments]
    sys.path.append(str(Path.cwd()))  # for a data class that is the user's own, as python -m does
    try:
        if name == "-sc":
            return complete(arguments)
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

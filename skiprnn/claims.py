"""What the papers claim, and what the published records say of it.

python -m skiprnn.claims [results]: prints both, and writes them to results/claims.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from skiprnn.model.pretrained import SUFFIX
from skiprnn.papers import claims
from skiprnn.training.command_line import arguments_of
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import write_atomically


def main(arguments: Sequence[str]) -> None:
    """Judge the claims of experiments/claims.yaml by a folder's records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of published results")
    folder = arguments_of(parser, arguments).results
    try:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder of published results")
        text = claims.markdown(claims.read(folder))
        write_atomically(folder / "claims.md", text.encode())
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{text}\nwritten to {folder / 'claims.md'}")
    if any(folder.rglob(f"*{SUFFIX}")):
        print(f"Next: python -m skiprnn.evaluate {shlex.quote(f'verify={folder}')}")


if __name__ == "__main__":
    main(sys.argv[1:])

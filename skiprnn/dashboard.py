"""Run folders -> one HTML page: how far each sweep is, its table, curves and runs, and which samples its models use.

    python -m skiprnn.dashboard [outputs] [--page outputs/dashboard.html]
    python -m skiprnn.dashboard outputs --serve
    python -m skiprnn.dashboard --wandb [ENTITY/]PROJECT

The page opens from disk and needs no network. Served, on the loopback address alone, it follows a sweep while it runs.
The third form writes the same views as a workspace on wandb, from what the runs logged there.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from skiprnn.training.command_line import arguments_of
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import write_atomically
from skiprnn.views import page, workspace
from skiprnn.views.server import LOOPBACK, Server


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, serve it, or write the workspace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs"), help="folder of run folders")
    parser.add_argument("--page", type=Path, help="the file to write (OUTPUT/dashboard.html)")
    parser.add_argument(
        "--serve", type=int, nargs="?", const=8021, metavar="PORT", help="serve it on this machine (8021)"
    )
    parser.add_argument("--results", type=Path, help="folder of published records, for the papers' claims (results)")
    parser.add_argument("--wandb", metavar="[ENTITY/]PROJECT", help="write the wandb workspace of this project instead")
    given = arguments_of(parser, arguments)
    results = given.results or Path("results")
    left_out: dict[str, None] = {}
    try:
        if given.wandb:
            print(workspace.save(given.wandb))
            return
        claims = page.judged(results) if given.results or results.is_dir() else ()
        if given.serve is not None:
            page.content(given.output, print)
            with Server(given.serve, given.output, claims) as server:
                print(
                    f"http://{LOOPBACK}:{server.server_port}/ shows {given.output} as it is; Ctrl-C ends it", flush=True
                )
                with suppress(KeyboardInterrupt):
                    server.serve_forever()
            return
        file = given.page or given.output / "dashboard.html"
        write_atomically(file, page.html(given.output, left_out.setdefault, claims).encode())
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {file}; while runs go on, python -m skiprnn.dashboard {given.output} --serve")
    if left_out:
        sys.exit("\n".join(f"error: {problem}" for problem in left_out))


if __name__ == "__main__":
    main()

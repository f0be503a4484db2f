"""Run folders -> one HTML page: how far each sweep is, its table, curves and runs, and which samples its models use.

    python -m skiprnn.dashboard [outputs] [--page outputs/dashboard.html]
    python -m skiprnn.dashboard outputs --serve
    python -m skiprnn.dashboard --wandb [ENTITY/]PROJECT

The page opens from disk and needs no network. Served, on the loopback address alone, it follows a sweep while it runs.
The third form writes the same views as a workspace on wandb, from what the runs logged there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from skiprnn.training.config import ConfigError, arguments_of
from skiprnn.training.folder import write_atomically
from skiprnn.views import page

LOOPBACK = "127.0.0.1"


class Handler(BaseHTTPRequestHandler):
    """Answers with the page, its content as it is now, a run, a picture; nothing else is given out."""

    server: "Server"

    def do_GET(self) -> None:
        address, _, asked = self.path.partition("?")
        host = self.headers.get("Host", "").rpartition(":")[0]
        output, claims = self.server.output, self.server.claims
        try:
            if host not in (LOOPBACK, "localhost"):  # another site's script, by a name of its own
                self.send_error(HTTPStatus.FORBIDDEN)
            elif address == "/":
                self.answer(page.html(output, self.server.tell, claims, served=True).encode(), "text/html")
            elif address == "/content.json":
                self.answer(json.dumps(page.content(output, self.server.tell, claims)).encode(), "application/json")
            elif address == "/run.json":
                run = page.runs_of(output)[unquote(asked)]
                self.answer(json.dumps(page.detail(run, self.server.tell)).encode(), "application/json")
            else:
                run = page.runs_of(output)[unquote(address).removeprefix("/").removesuffix("/usage.png")]
                self.answer((run.folder.path / "usage.png").read_bytes(), "image/png")
        except (KeyError, FileNotFoundError):
            self.send_error(HTTPStatus.NOT_FOUND)
        except ConfigError as error:
            self.send_error(HTTPStatus.NOT_FOUND, str(error))

    def answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The terminal stays quiet."""


class Server(ThreadingHTTPServer):
    """The page on the loopback address.

    Args:
        port: 0: any that is free.
        output, claims: as of skiprnn.views.page.content.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, port: int, output: Path, claims: Sequence[dict[str, Any]]):
        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--serve {port}: {error}; --serve 0 takes a port that is free") from None
        self.output, self.claims = output, claims
        self.told: set[str] = set()

    def tell(self, problem: str) -> None:
        """Once."""
        if problem not in self.told:
            self.told.add(problem)
            print(f"error: {problem}", file=sys.stderr)


def workspace(entity: str, project: str) -> Any:
    """The same views as a wandb workspace, not yet saved: trade-off, learning, used samples."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    scores = {"accuracy": "accuracy", "mse": "mean squared error"}
    updates = panels.SummaryMetric("test/state_updates")
    tradeoff: list[Any] = [
        panels.ScatterPlot(
            title=f"Test {title} against state updates", x=updates, y=panels.SummaryMetric(f"test/{key}")
        )
        for key, title in scores.items()
    ]
    tradeoff += [panels.ScatterPlot(title="State updates against λ", x=panels.Config("lambda"), y=updates, log_x=True)]
    learning: list[Any] = [
        panels.LinePlot(title=f"Validation {title}", x="epoch", y=[f"validation/{key}"], groupby_rangefunc="minmax")
        for key, title in (scores | {"state_updates": "state updates", "loss": "loss"}).items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="skiprnn: accuracy against computation",
        sections=[
            workspaces.Section("Accuracy against computation", panels=tradeoff, is_open=True),
            workspaces.Section("Learning", panels=learning, is_open=True),
            workspaces.Section("Used samples", panels=[panels.MediaBrowser(media_keys=["usage"])], is_open=True),
        ],
        settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            pinned_columns=[
                *("config:lambda", "config:p_skip", "config:seed"),
                *("summary:test/accuracy", "summary:test/mse", "summary:test/state_updates", "summary:best_epoch"),
            ],
        ),
    )


def save_workspace(target: str) -> str:
    """Write the workspace to wandb; returns its address.

    Raises:
        ConfigError: no library, no key, no such project, or no server.
    """
    *entity, project = target.split("/")
    try:
        import wandb  # here, for it is slow to import and seldom wanted

        if not wandb.login(prompt=False):
            raise ConfigError("--wandb needs a key: wandb login, or WANDB_API_KEY")
        return workspace(entity[0] if entity else wandb.Api().default_entity or "", project).save().url
    except ModuleNotFoundError as error:
        raise ConfigError(f"--wandb needs {error.name}: pip install 'skiprnn[wandb]'") from None
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb {target}: {str(error).splitlines()[0]}") from None


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
            print(save_workspace(given.wandb))
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

"""The page, served on the loopback address alone: it follows a sweep while it runs."""

import json
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from skiprnn.training.config import ConfigError
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

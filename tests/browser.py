"""Chromium, driven through chromedriver by the W3C's WebDriver protocol: what a page does, says and looks like."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver: apt-get install chromium chromium-driver"


class Browser:
    """A window of a given width.

    Args:
        service: chromedriver's address.
        width: of the window, in pixels.
    """

    def __init__(self, service: str, width: int):
        self.session = service
        screen = {
            "deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1, "touch": False, "mobile": width < 600}
        }
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu"],
            "mobileEmulation": screen,
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"{service}/session/{session['sessionId']}"

    def call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(content or {}).encode()
        request = Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, seconds: float = 60) -> Any:
        """What an expression comes to, once that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end, f"{script} was never true"
            time.sleep(0.1)
        return value

    def messages(self) -> list[str]:
        """Of the console since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def shoot(self, file: Path) -> None:
        """A picture of the whole page."""
        options = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True}}
        file.write_bytes(base64.b64decode(self.call("POST", "/goog/cdp/execute", options)["data"]))


@contextmanager
def browser(width: int) -> Iterator[Browser]:
    """A browser, for as long as it is needed."""
    service = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert service.stdout is not None
        port = next(
            line.rsplit("port ", 1)[1].strip(" .\n") for line in service.stdout if "successfully on port" in line
        )
        window = Browser(f"http://127.0.0.1:{port}", width)
        try:
            yield window
        finally:
            window.call("DELETE", "")
    finally:
        service.terminate()
        service.wait()

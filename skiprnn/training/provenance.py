"""Where a result comes from: the commit, the versions, the machine."""

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch

from skiprnn import __version__
from skiprnn.model.engines import contact
from skiprnn.training.config import PACKAGE

SNAPSHOT = "snapshot.json"  # in a copy of this package outside its repository: the code_version that it is of
RECORDED_PACKAGES = ("torch", "pytorch-lightning", "numpy")


@functools.cache
def code_version() -> dict[str, Any] | None:
    """The git commit, and whether files differ from it, when this process first asked: what is committed later is not
    what it runs. Untracked files count where code and settings are.

    None where no repository tracks this package: an installed one may lie inside somebody else's. What a copy is of,
    SKIPRNN_COMMIT may say, in the words of `git describe --always --abbrev=40 --dirty`.
    """
    if told := os.environ.get("SKIPRNN_COMMIT"):
        return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")}
    if (file := PACKAGE / SNAPSHOT).exists():
        return json.loads(file.read_text())

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", PACKAGE.name):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        added = git(
            "ls-files", "--others", "--exclude-standard", "--", PACKAGE.name, "conf", "experiments", "hydra_plugins"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed or added)}
    except (OSError, subprocess.CalledProcessError):
        return None


def place(device: torch.device, engine: str, pack: int) -> dict[str, Any]:
    """The device's name, the engine, and how many runs the process trains or tests at once."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {"device": name, "engine": engine, "pack": pack}


def describe(device: torch.device, engine: str, pack: int = 1) -> dict[str, Any]:
    """Of a result computed now by this process: code, versions, machine.

    On a GPU also what its engines were checked on, and the precision of their products.
    """
    checks: dict[str, Any] = {}
    if device.type == "cuda":
        precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
        checks = {"checked": contact.place("cuda"), "products": precision}
    packages = {name: version(name) for name in RECORDED_PACKAGES}
    versions = {"python": platform.python_version(), "skiprnn": __version__} | packages
    here = {"git": code_version(), "versions": versions, "threads": torch.get_num_threads()}
    return checks | here | place(device, engine, pack)

"""First contact: on a GPU an engine is compared with the reference engine before it counts.

Once per device, driver, versions and state of the engines' code, in processes of their own, which a kernel may bring
down; the verdict is kept in the user's cache (SKIPRNN_CACHE). `python -m skiprnn.model.engines check` prints it.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from skiprnn.model.engines.call import CELLS, POLICIES
from skiprnn.model.engines.native.build import cache_folder

TOLERANCE = 5e-3  # relative, of outputs and gradients: what products in tf32 leave of float32
LATE = "its check took too long"  # this time
SECONDS = 300.0  # that a check may take


class Variant(NamedTuple):
    """What an engine may serve, or get wrong, by itself."""

    cell: str
    policy: str
    layers: int

    def __str__(self) -> str:
        return f"{self.cell}-{self.policy}-{self.layers}"


def variant(cell: str, policy: str, layers: int) -> Variant:
    """The one to be checked: layers are run one by one but for Skip's, and two of those are as good as more."""
    return Variant(cell, policy, min(layers, 2))


VARIANTS = [Variant(cell.name, policy.name, layers) for cell, policy, layers in product(CELLS, POLICIES, (1, 2))]


def place(device: str) -> dict[str, str]:
    """What a verdict is of."""
    sources = [file for kind in ("*.py", "*.cu") for file in sorted(Path(__file__).parent.rglob(kind))]
    code = b"".join(file.read_bytes() for file in sources)
    found = {"torch": torch.__version__, "code": hashlib.sha256(code).hexdigest()[:16], "device": device}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "driver": _driver()}
    return found


@cache  # a run of nvidia-smi takes up to seconds
def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return str(torch.version.hip or torch.version.cuda)


def verdict(
    engine: str, device: str, variants: Sequence[Variant], seconds: float = SECONDS
) -> dict[Variant, float | str]:
    """Each variant's error or failure: what is kept of earlier checks, or that of one now.

    Args:
        seconds: that the check of a variant may take. One that takes longer is not kept.
    """
    where = place(device)
    digest = hashlib.sha256(json.dumps(where | {"engine": engine}).encode()).hexdigest()[:16]
    file = cache_folder() / f"contact-{engine}-{digest}.json"
    kept: dict[str, float | str] = {}
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(file.read_bytes())["variants"]
    missing = [tested for tested in variants if str(tested) not in kept]
    if missing:
        print(f"skiprnn: checking its {engine} engine on {where['device']}, once, about a minute", file=sys.stderr)
        with ThreadPoolExecutor(max((os.cpu_count() or 1) // 2, 1)) as pool:
            found = pool.map(partial(_checked, engine, device, seconds), missing)
            kept |= {str(tested): error for tested, error in zip(missing, found, strict=True)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            known = {name: error for name, error in kept.items() if error != LATE}
            part.write_text(json.dumps({"place": where, "variants": known}, indent=2))
            part.replace(file)
        except OSError as reason:
            print(f"skiprnn: cannot keep that in {file.parent}: {reason.strerror}", file=sys.stderr)
    return {tested: kept[str(tested)] for tested in variants}


def _checked(engine: str, device: str, seconds: float, tested: Variant) -> float | str:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "skiprnn.model.engines", "check", "--device", device, "--of", engine, str(tested)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return LATE
    except ValueError:
        told = done.stderr.strip().splitlines()
        return f"its process ended with status {done.returncode}{f': {told[-1]}' if told else ''}"


def reason(found: float | str) -> str | None:
    """Why what was found of a variant rules it out; None if it does not."""
    if isinstance(found, str):
        return found
    return None if found <= TOLERANCE else f"it differs from the reference by {found:.0e}"


@cache
def refused(engine: str, device: str, cell: str, policy: str, layers: int) -> str | None:
    """Why an engine is not to be used for these here; None if it is as good as the reference."""
    tested = variant(cell, policy, layers)
    return reason(verdict(engine, device, [tested])[tested])

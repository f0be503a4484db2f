"""First contact: on a GPU an engine is compared with the reference engine before it counts.

Once per device, driver, versions and state of the engines' code, in processes of their own, which a kernel may bring
down; the verdict is kept in the user's cache (SKIPRNN_CACHE). `python -m skiprnn.model.engines check` prints it.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model.engines.call import CELLS, POLICIES
from skiprnn.model.engines.native.build import cache_folder
from skiprnn.model.policies import Skip

TOLERANCE = 5e-3  # relative, of outputs and gradients: what products in tf32 leave of float32
LATE = "its check took too long"  # this time
SEEDS = 6  # a decision on the edge is rounded either way: so many inputs are tried
SECONDS = 300.0  # that a check may take
SHAPE, RAGGED = (16, 16, 1, 110), (5, 9, 2, 110)  # B, T, I, H: whole tiles, as are common; and odd sizes with lengths


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


def error(engine: str, device: str, tested: Variant, lengths: bool) -> float:
    """The largest relative error of outputs and gradients against the reference in float64; inf: other decisions."""
    from skiprnn.model.recurrent import Recurrent  # which chooses engines

    batch, steps, inputs, hidden = RAGGED if lengths else SHAPE
    p_skip = 0.4 if tested.policy.startswith("random") else None
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        rnn = Recurrent(*tested[:2], inputs, hidden, tested.layers, batch_first=True, p_skip=p_skip)
        if isinstance(rnn.policy, Skip):
            torch.nn.init.constant_(rnn.policy.bias, -0.5)
        x = torch.randn(batch, steps, inputs)
        given = torch.randint(1, steps + 1, (batch,)) if lengths else None
        draw = rnn.policy.draw(x, sum(cell.hidden_size for cell in rnn.cells))
        found = [
            _outcome(rnn.to(place, dtype), x.to(place, dtype), given, draw, name)
            for name, place, dtype in (("reference", "cpu", torch.float64), (engine, device, torch.float32))
        ]
        if torch.equal(found[0][0], found[1][0].double()):
            pairs = zip(found[0][1:], found[1][1:], strict=True)
            return max(float((one - other).norm() / one.norm().clamp_min(1e-6)) for one, other in pairs)
    return float("inf")


def _outcome(rnn, x: Tensor, lengths: Tensor | None, draw: Tensor | None, engine: str) -> list[Tensor]:
    """Updates, output and gradients, on the CPU."""
    from skiprnn.model import engines

    rnn.zero_grad()
    draw = None if draw is None else draw.to(x)
    call = rnn.prepare(x, lengths=None if lengths is None else lengths.to(x.device), draw=draw)
    with torch.no_grad():
        (inferred,) = engines.run_packed(engine, [call])
    (result,) = engines.run_packed(engine, [call])
    loss = result.output.sum() + result.states[-1][0].square().sum() + 1e-2 * result.updates.sum()
    loss.backward()
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in rnn.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        groups.setdefault("policy" if name.startswith("policy") else name, []).append(gradient.flatten())
    gradients = [torch.cat(parts) for parts in groups.values()]
    return [tensor.detach().cpu().double() for tensor in (result.updates, result.output, inferred.output, *gradients)]


def check(engine: str, device: str, tested: Variant) -> float | str:
    """The variant's largest error, or why it fails."""
    try:
        return max(error(engine, device, tested, lengths) for lengths in (False, True))
    except Exception as failure:  # whatever compilers and drivers come up with
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"


def milliseconds(engine: str, device: str, tested: Variant, steps: int = 32) -> float:
    """Of one time step, forward and backward, with 256 sequences of one input and 110 units."""
    from skiprnn.model.recurrent import Recurrent

    p_skip = 0.5 if tested.policy.startswith("random") else None
    rnn = Recurrent(*tested[:2], 1, 110, tested.layers, batch_first=True, engine=engine, p_skip=p_skip, device=device)
    x, times = torch.rand(256, steps, 1, device=device), []
    for _ in range(4):
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad(rnn(x)[0].sum(), [rnn.cells[0].weight_hh])
        gradient.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / steps


def place(device: str) -> dict[str, str]:
    """What a verdict is of."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
    found = {"torch": torch.__version__, "code": hashlib.sha256(code).hexdigest()[:16], "device": device}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "driver": _driver()}
    return found


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

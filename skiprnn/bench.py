"""How long the engines take, relative to torch.nn: python -m skiprnn.bench [--quick] [--output FOLDER].

Every figure is the median of repetitions that alternate with torch.nn's in one process, so that a busy machine disturbs
both alike. torch.nn's time depends on malloc, so all is measured twice: as it comes, and tuned to keep its pages.
Update rates are forced: w_p = 0 and a constant q give one update in n steps; "desynchronised" rows start at random s.
The inputs are random, so nothing is gained from repeated samples. Numbers too small to be normal are flushed to 0.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from skiprnn import Recurrent, RecurrentState
from skiprnn.model.policies import Skip
from skiprnn.training.timing import alternate

TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}
SHAPES = {  # B, T, I, H, L
    "mnist": (256, 784, 1, 110, 1),
    "mnist, B=1": (1, 784, 1, 110, 1),
    "imdb": (256, 200, 300, 128, 1),
    "ucf101": (32, 250, 2048, 512, 2),
}
RATES = {1: "100 %", 2: "50 %", 10: "10 %"}
CURVE = (1, 2, 3, 4, 6, 10, 20, 50)
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU}  # what each cell is compared with


def skip_network(cell: str, shape, period: int, engine: str = "native") -> Recurrent:
    """A Skip RNN that updates at one step in `period`, whatever it reads."""
    _, _, inputs, hidden, layers = shape
    rnn = Recurrent(cell, "skip", inputs, hidden, layers, engine=engine, batch_first=True)
    assert isinstance(rnn.policy, Skip)
    with torch.no_grad():
        rnn.policy.weight.zero_()
        rnn.policy.bias.fill_(torch.logit(torch.tensor(0.9 if period == 1 else 0.5 / (period - 0.5))))
    return rnn


def desynchronised(rnn: Recurrent, batch: int) -> RecurrentState:
    """An initial state whose rows update at different times."""
    assert isinstance(rnn.policy, Skip)
    q = torch.sigmoid(rnn.policy.bias.detach()).expand(batch, 1)
    return rnn.pack([cell.initial_state(batch) for cell in rnn.cells], (q, torch.rand(batch, 1) / 2))


def train(rnn: Any, x: Tensor, scattered: bool = False) -> None:
    """Forward and backward of a classifier's loss on the last state; the input needs no gradient."""
    result = rnn(x, desynchronised(rnn, len(x))) if scattered else rnn(x)
    state = result[1]
    last = state.h if isinstance(state, RecurrentState) else state[0] if isinstance(state, tuple) else state
    loss = last[-1].square().sum()
    if len(result) == 3 and result[2].requires_grad:
        loss = loss + 1e-4 * result[2].sum()
    loss.backward()
    rnn.zero_grad(set_to_none=True)


@torch.no_grad()
def infer(rnn: Any, x: Tensor, scattered: bool = False) -> None:
    rnn(x, desynchronised(rnn, len(x))) if scattered else rnn(x)


def candidates(cell: str, shape, task, reference: bool) -> dict[str, Callable[[], None]]:
    """What is measured on one shape: torch.nn first, everything else relative to it."""
    batch, steps, inputs, hidden, layers = shape
    x = torch.rand(batch, steps, inputs)
    found: dict[str, Callable[[], None]] = {}

    def add(name: str, rnn: nn.Module, **options) -> None:
        found[name] = lambda: task(rnn, x, **options)

    add("torch", TORCH[cell](inputs, hidden, layers, batch_first=True))
    add("always", Recurrent(cell, "always", inputs, hidden, layers, engine="native", batch_first=True))
    for period, rate in RATES.items():
        rnn = skip_network(cell, shape, period)
        add(f"skip {rate}", rnn)
        if period > 1 and batch > 1:
            add(f"skip {rate} desynchronised", rnn, scattered=True)
    if reference:
        add("skip 50 %, reference engine", skip_network(cell, shape, 2, engine="reference"))
    return found


def floor(cell: str, shape, rate: float, task, flops_per_second: float) -> float:
    """Seconds that the matrix products of the updates alone would take at the speed of a large matrix product."""
    batch, steps, inputs, hidden, layers = shape
    multiplied = sum(layer.flops_per_update() for layer in Recurrent(cell, "always", inputs, hidden, layers).cells)
    products = 3 if task is train else 1  # backward: the gradients of the state and of the weights
    return 2 * products * batch * steps * rate * multiplied / flops_per_second


def matrix_speed() -> float:
    """Multiplications and additions per second of a large matrix product."""
    a, b = torch.rand(2, 1536, 1536)
    return 2 * 1536**3 / alternate({"mm": lambda: a @ b}, 5)["mm"]


def measure(arguments) -> dict:
    """All measurements of this process."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shapes = {"mnist": SHAPES["mnist"], "mnist, B=1": SHAPES["mnist, B=1"]} if arguments.quick else SHAPES
    speed = matrix_speed()
    measured: dict = {"matrix_flops_per_second": speed, "times": [], "curve": {}}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, shape in shapes.items():
            for cell in TORCH:
                for task in (infer,) if shape[0] == 1 else (train, infer):
                    reference = not arguments.quick and name == "mnist" and task is train
                    functions = candidates(cell, shape, task, reference)
                    label = f"{name}, {cell}, {task.__name__}"
                    bar = progress.add_task(label, total=len(functions) * (arguments.repetitions + 1))
                    seconds = alternate(functions, arguments.repetitions, lambda bar=bar: progress.advance(bar))
                    floors = {f"skip {r}": floor(cell, shape, 1 / n, task, speed) for n, r in RATES.items()}
                    measured["times"].append(
                        {"shape": name, "cell": cell, "task": task.__name__, "seconds": seconds, "floor": floors}
                    )
        shape = SHAPES["mnist"]
        for task in (train, infer):
            x = torch.rand(*shape[:3])
            networks = {n: skip_network("lstm", shape, n) for n in CURVE}
            functions = {str(n): partial(task, rnn, x) for n, rnn in networks.items()}
            bar = progress.add_task(f"against rate, {task.__name__}", total=len(CURVE) * (arguments.repetitions + 1))
            measured["curve"][task.__name__] = alternate(
                functions, arguments.repetitions, lambda bar=bar: progress.advance(bar)
            )
    return measured


def peak_memory(name: str) -> int:
    """Bytes that a training step adds to this process, which must be a fresh one."""
    shape = SHAPES["mnist"]
    rnn = nn.LSTM(1, 110, batch_first=True) if name == "torch" else skip_network("lstm", shape, int(name))
    x = torch.rand(*shape[:3])
    train(rnn, x[:2, :4])  # what is loaded on first use is not the step's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(rnn, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def child(arguments: list[str], environment: dict[str, str]) -> dict:
    """Run this module anew in another environment, and read what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "skiprnn.bench", *arguments, "--child", str(path)]
        subprocess.run(command, env=os.environ | environment, check=True)
        return json.loads(path.read_text())


def machine(threads: int) -> dict:
    from skiprnn.model.engines.native import build

    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "vectors": build.best_variant() if build.available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(report: dict) -> Table:
    """Times relative to torch.nn's, default and tuned malloc side by side."""
    result = Table("shape", "cell", "task", "network", "default malloc", "tuned malloc", "ms", "floor ms")
    for default, tuned in zip(report["default"]["times"], report["tuned"]["times"], strict=True):
        for name, seconds in default["seconds"].items():
            relative = [run["seconds"][name] / run["seconds"]["torch"] for run in (default, tuned)]
            lowest = default["floor"].get(name)
            result.add_row(
                *(default[key] for key in ("shape", "cell", "task")),
                name,
                *(f"{value:.3f}" for value in relative),
                f"{seconds * 1e3:.1f}",
                "" if lowest is None else f"{lowest * 1e3:.1f}",
            )
    return result


def draw(report: dict) -> Any:
    """Time against update rate, beside torch.nn's: a straight line through nearly zero is the aim."""
    from matplotlib import rc_context  # here: what is imported is no part of a training step's memory
    from matplotlib.figure import Figure

    from skiprnn.views import style

    with rc_context(style.STYLE):
        figure = Figure((style.WIDTH, 2.4))
        axes = figure.subplots()
        whole = {(one["shape"], one["cell"], one["task"]): one["seconds"] for one in report["default"]["times"]}
        for (task, times), colour in zip(report["default"]["curve"].items(), style.PALETTE, strict=False):
            rates, milliseconds = [100 / int(n) for n in times], [1e3 * t for t in times.values()]
            axes.plot(rates, milliseconds, "o-", markersize=3, color=colour, label=f"Skip LSTM, {task}")
            of_torch = 1e3 * whole["mnist", "lstm", task]["torch"]
            axes.axhline(of_torch, color=colour, linestyle="--", label=f"nn.LSTM, {task}")
        axes.set(xlabel="state updates, % of the steps", ylabel="ms per batch", xlim=(0, None), ylim=(0, None))
        axes.set_title("B=256, T=784, H=110; median of repetitions")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write bench.json and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MNIST's shape only, without the reference engine")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder for bench.json and the plot")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        done = {"bytes": peak_memory(given.memory)} if given.memory else measure(given)
        given.child.write_text(json.dumps(done))
        return
    passed = [f"--repetitions={given.repetitions}", f"--threads={given.threads}"]
    passed += ["--quick"] if given.quick else []
    report = {"machine": machine(given.threads)}
    for column, environment in (("default", {}), ("tuned", TUNED)):
        report[column] = child(passed, environment)
    report["memory"] = {name: child(["--memory", name], {})["bytes"] for name in ("torch", "1", "2", "10")}
    if torch.cuda.is_available():
        from skiprnn import bench_gpu

        report["gpu"] = bench_gpu.measure(torch.device("cuda"), given.repetitions)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "bench.json").write_text(json.dumps(report, indent=1))
    draw(report).savefig(given.output / "time-against-rate.png", dpi=300)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table(report))
    if "gpu" in report:
        console.print(bench_gpu.table(report["gpu"]))
    torch_bytes = report["memory"]["torch"]
    shares = [f"{RATES[int(n)]}: {b / torch_bytes:.2f}" for n, b in report["memory"].items() if n != "torch"]
    console.print(f"memory of a training step, Skip LSTM / nn.LSTM ({math.ceil(torch_bytes / 2**20)} MiB): {shares}")
    console.print(f"written to {given.output}")


if __name__ == "__main__":
    main()

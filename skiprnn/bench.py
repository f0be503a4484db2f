"""How long the engines take, relative to torch.nn: python -m skiprnn.bench [--quick] [--output FOLDER].

Every figure is the median of repetitions that alternate with torch.nn's in one process, so that a busy machine disturbs
both alike. torch.nn's time depends on malloc, so all is measured twice: as it comes, and tuned to keep its pages.
The inputs are random, so nothing is gained from repeated samples. Numbers too small to be normal are flushed to 0.
Inference of one sequence at a time is also measured with bfloat16 weights and, where skiprnn[onnx] is installed, in
ONNX Runtime; "ONNX Runtime" alone is its LSTM or GRU, of the same weights as torch.nn's.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skiprnn.benchmarks import cpu, gpu
from skiprnn.benchmarks.networks import RATES
from skiprnn.training.command_line import arguments_of

TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}


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
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "vectors": build.best_variant() if build.available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


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
    given = arguments_of(parser, arguments)
    if given.child:
        done = {"bytes": cpu.peak_memory(given.memory)} if given.memory else cpu.measure(given)
        given.child.write_text(json.dumps(done))
        return
    passed = [f"--repetitions={given.repetitions}", f"--threads={given.threads}"]
    passed += ["--quick"] if given.quick else []
    report = {"machine": machine(given.threads)}
    for column, environment in (("default", {}), ("tuned", TUNED)):
        report[column] = child(passed, environment)
    report["memory"] = {name: child(["--memory", name], {})["bytes"] for name in ("torch", "1", "2", "10")}
    if torch.cuda.is_available():
        report["gpu"] = gpu.measure(torch.device("cuda"), given.repetitions)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "bench.json").write_text(json.dumps(report, indent=1))
    draw(report).savefig(given.output / "time-against-rate.png", dpi=300)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(cpu.table(report))
    if "gpu" in report:
        console.print(gpu.table(report["gpu"]))
    torch_bytes = report["memory"]["torch"]
    shares = [f"{RATES[int(n)]}: {b / torch_bytes:.2f}" for n, b in report["memory"].items() if n != "torch"]
    console.print(f"memory of a training step, Skip LSTM / nn.LSTM ({math.ceil(torch_bytes / 2**20)} MiB): {shares}")
    console.print(f"written to {given.output}")


if __name__ == "__main__":
    main()

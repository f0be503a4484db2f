"""The GPU bench up to the device: its networks, floors and table, with the CPU's engine in place of the GPU's."""

import torch
from rich.console import Console

from skiprnn.benchmarks import gpu


def test_measures_everything_and_prints_it():
    report = gpu.measure(torch.device("cpu"), 1, shape=(2, 12, 1, 4, 1), engine="auto", packs=(1, 3), size=16)
    assert report["times"]["train"].keys() == report["times"]["infer"].keys()
    assert {"cuDNN lstm", "cuDNN gru", "skip gru 10 %", "sa gru", "skip lstm 100 %, 3 packed"} <= report["times"][
        "train"
    ].keys()
    assert all(seconds > 0 for times in report["times"].values() for seconds in times.values())
    console = Console(width=120, record=True)
    console.print(gpu.table(report))
    lines = console.export_text().splitlines()
    assert sum("1.00" in line and "cuDNN" in line for line in lines) == 4  # each relative to itself


def test_floors_follow_from_the_shape():
    """Twice the batch, twice the work; training multiplies three times as much."""
    device = torch.device("cpu")
    speeds = {"product": 2 * 16**3 / 1e9, "copy": 2 * 64 * 16 * 4 / 1e9}  # 1 GFLOP/s, 1 GB/s
    medians, gpu.medians = gpu.medians, lambda *_: speeds
    try:
        inference = gpu.floors((2, 3, 1, 4, 1), False, device, 1, 16)["lstm"]
        training = gpu.floors((4, 3, 1, 4, 1), True, device, 1, 16)["lstm"]
    finally:
        gpu.medians = medians
    assert abs(inference["arithmetic"] - 2 * 2 * 3 * 4 * 4 * 5 / 1e9) < 1e-15
    assert abs(training["arithmetic"] - 6 * inference["arithmetic"]) < 1e-15
    assert abs(inference["memory"] - 2 * 3 * 4 * 4 / 1e9) < 1e-15

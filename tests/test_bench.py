"""The GPU bench up to the device: its networks, floors and table, with the CPU's engine in place of the GPU's."""

import torch
from rich.console import Console

from skiprnn.benchmarks import gpu
from skiprnn.model import engines
from skiprnn.model.engines import contact


def report(names):
    return gpu.measure(torch.device("cpu"), 1, shape=(2, 12, 1, 4, 1), names=names, packs=(1, 3), size=16)


def printed(measured) -> list[str]:
    console = Console(width=140, record=True)
    console.print(gpu.table(measured))
    return console.export_text().splitlines()


def test_measures_every_engine_and_prints_it():
    measured = report(["batched", "reference"])
    networks = ["lstm", "skip gru 10 %", "sa gru", "skip lstm 100 %, 3 packed"]
    expected = {
        "cuDNN lstm",
        "cuDNN gru",
        *(f"{engine}: {one}" for engine in ("batched", "reference") for one in networks),
    }
    for times in measured["times"].values():
        assert expected <= times.keys()
        assert all(seconds > 0 for seconds in times.values())
    assert measured["times"]["train"].keys() == measured["times"]["infer"].keys()
    assert sum("1.00" in line and "cuDNN" in line for line in printed(measured)) == 4  # each relative to itself


def test_what_an_engine_does_not_serve_or_gets_wrong_is_left_out(monkeypatch):
    def unsupported(cells, policy, x):
        return "it is no gru" if cells[0].name == "gru" else None

    monkeypatch.setattr(engines.batched, "unsupported", unsupported)
    measured = report(["batched", "cuda"])
    kept = [name for name in measured["times"]["train"] if not name.startswith("cuDNN")]
    assert kept == ["batched: lstm", *(f"batched: skip lstm {rate}" for rate in ("100 %", "50 %", "10 %"))] + [
        f"batched: skip lstm 100 %, {count} packed" for count in (1, 3)
    ]
    assert measured["left_out"]["batched: sa gru"] == "it is no gru"
    assert any("left out: cuda: lstm: it runs on NVIDIA's GPUs" in line for line in printed(measured))
    monkeypatch.setattr(contact, "refused", lambda engine, *of: f"it differs: {engine} {of}")
    rnn, x = gpu.skip_network("lstm", (2, 12, 1, 4, 1), 1), torch.empty(2, 12, 1, device="meta")
    assert gpu.refused("batched", rnn, x) == "it differs: batched ('meta', 'lstm', 'skip', 1)"


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

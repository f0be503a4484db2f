"""How long the GPU engines take, relative to cuDNN's LSTM and GRU in the same process.

Medians of repetitions that alternate with cuDNN's, timed by device events; "packed" is one step of so many Skip LSTMs
side by side. Floors: the time that the products of a step would take at the speed of a large product in the same
precision, and that its states and gates would take at the speed of a copy. What an engine does not serve, or gets wrong
on this GPU, is left out, and named.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from skiprnn import SAGRU
from skiprnn.benchmarks.networks import RATES, SHAPES, TORCH, infer, skip_network, train
from skiprnn.model import engines
from skiprnn.model.cells import CELLS
from skiprnn.model.engines import contact
from skiprnn.model.recurrent import Recurrent
from skiprnn.training.timing import alternate, passed

SHAPE = SHAPES["mnist"]
PACKS = (1, 4, 8, 24)
ENGINES = ("cuda", "triton")


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, by the device's own clock."""
    if device.type != "cuda":
        return passed(function)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def medians(functions: dict[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, float]:
    """The median seconds of each, all run in turn after two rounds to warm up (and to compile)."""
    return alternate(functions, repetitions, seconds=partial(seconds, device=device), warm_up=2)


def packed_step(networks: list[Recurrent], x: Tensor, training: bool) -> None:
    """One step of all networks on the same batch."""
    with torch.set_grad_enabled(training):
        results = engines.run_packed(networks[0].engine_for(x), [rnn.prepare(x) for rnn in networks])
        if training:
            losses = [result.states[-1][0].square().sum() + 1e-4 * result.updates.sum() for result in results]
            torch.stack(losses).sum().backward()
            for rnn in networks:
                rnn.zero_grad(set_to_none=True)


def networks(shape, engine: str) -> Iterator[tuple[str, Recurrent]]:
    """What is measured of an engine."""
    _, _, inputs, hidden, _ = shape
    for cell in TORCH:
        yield cell, Recurrent(cell, "always", inputs, hidden, engine=engine, batch_first=True)
        for period, rate in RATES.items():
            yield f"skip {cell} {rate}", skip_network(cell, shape, period, engine)
    yield "sa gru", SAGRU(inputs, hidden, engine=engine, batch_first=True)


def refused(engine: str, rnn: Recurrent, x: Tensor) -> str | None:
    """Why an engine is not measured on a network: it does not serve it or, on a GPU, gets it wrong."""
    reason = engines.ENGINES[engine].unsupported(rnn.cells, rnn.policy, x)
    if reason or x.device.type == "cpu":
        return reason
    return contact.refused(engine, x.device.type, rnn.cells[0].name, rnn.policy.name, len(rnn.cells))


def functions(
    shape, training: bool, device: torch.device, names: Sequence[str], packs=PACKS
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is measured: cuDNN's networks, then each engine's; and why what is left out is."""
    batch, steps, inputs, hidden, _ = shape
    x = torch.rand(batch, steps, inputs, device=device)
    task = train if training else infer
    found: dict[str, Callable[[], object]] = {
        f"cuDNN {cell}": partial(task, kind(inputs, hidden, batch_first=True).to(device), x)
        for cell, kind in TORCH.items()
    }
    left_out = {}
    for engine in names:
        for name, rnn in networks(shape, engine):
            if reason := refused(engine, rnn.to(device), x):
                left_out[f"{engine}: {name}"] = reason
            else:
                found[f"{engine}: {name}"] = partial(task, rnn, x)
        if f"{engine}: skip lstm {RATES[1]}" in found:
            for count in packs:
                pack = [skip_network("lstm", shape, 1, engine).to(device) for _ in range(count)]
                found[f"{engine}: skip lstm {RATES[1]}, {count} packed"] = partial(packed_step, pack, x, training)
    return found, left_out


def floors(
    shape, training: bool, device: torch.device, repetitions: int, size: int = 4096
) -> dict[str, dict[str, float]]:
    """Seconds of arithmetic and of memory traffic that a step of each cell cannot go below."""
    batch, steps, inputs, hidden, _ = shape
    a, b = torch.rand(2, size, size, device=device).to(torch.float16 if device.type == "cuda" else torch.float32)
    values = torch.empty(64 * size * size // 16, device=device)
    measured = medians({"product": lambda: a @ b, "copy": values.clone}, repetitions, device)
    flops = 2 * size**3 / measured["product"]
    bandwidth = 2 * values.numel() * values.element_size() / measured["copy"]
    result = {}
    for cell in TORCH:
        gates, entries = len(CELLS[cell].gates), len(CELLS[cell].state_names)
        multiplied = 2 * batch * steps * gates * hidden * (inputs + hidden) * (3 if training else 1)
        # h once in inference; in training also c and the gates, written once and read once, and the gates' gradients
        kept = batch * steps * hidden * 4
        moved = kept * (2 * (entries + gates) + 2 * gates) if training else kept
        result[cell] = {"arithmetic": multiplied / flops, "memory": moved / bandwidth}
    return result


def measure(
    device: torch.device, repetitions: int, shape=SHAPE, names: Sequence[str] = ENGINES, packs=PACKS, size: int = 4096
) -> dict:
    """All measurements."""
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report: dict = {"device": name, "cudnn": torch.backends.cudnn.version(), "shape": list(shape), "times": {}}
    for task in ("train", "infer"):
        training = task == "train"
        measured, report["left_out"] = functions(shape, training, device, names, packs)
        report["times"][task] = medians(measured, repetitions, device)
        report.setdefault("floors", {})[task] = floors(shape, training, device, repetitions, size)
    return report


def table(report: dict) -> Table:
    """Times relative to cuDNN's network of the same cell, and how near the floors are."""
    result = Table("task", "network", "ms", "/ cuDNN", "% of arithmetic", "% of memory", title=report["device"])
    for task, times in report["times"].items():
        for name, taken in times.items():
            cell = next(cell for cell in TORCH if cell in name)
            runs = int(name.split()[-2]) if name.endswith("packed") else 1
            floor = report["floors"][task][cell]
            shares = [f"{100 * runs * floor[kind] / taken:.1f}" for kind in ("arithmetic", "memory")]
            result.add_row(task, name, f"{1e3 * taken:.3f}", f"{taken / times[f'cuDNN {cell}']:.2f}", *shares)
    result.caption = "\n".join(f"left out: {name}: {reason}" for name, reason in report["left_out"].items())
    return result

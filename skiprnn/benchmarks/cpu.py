"""Engines on the CPU, relative to torch.nn, and to ONNX Runtime where it is installed."""

import resource
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from skiprnn import Recurrent
from skiprnn.benchmarks.networks import RATES, SHAPES, TORCH, infer, skip_network, train
from skiprnn.model import onnx
from skiprnn.training.timing import alternate

CURVE = (1, 2, 3, 4, 6, 10, 20, 50)
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}  # torch's, in ONNX's order
HAS_ONNX = all(map(find_spec, ("onnx", "onnxruntime")))


def onnx_model(module: nn.LSTM | nn.GRU) -> bytes:
    """ONNX's own operator with the weights of torch's: x (T, B, I) to output (T, B, H)."""
    from onnx import TensorProto, helper  # of skiprnn[onnx]

    operator, size = type(module).__name__, module.hidden_size
    nodes, constants, below = [], [helper.make_tensor("axis", TensorProto.INT64, [1], [1])], "x"
    for layer in range(module.num_layers):
        weights = [
            getattr(module, f"{name}_l{layer}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        w, r, *biases = (torch.cat([part.split(size)[gate] for gate in ONNX_GATES[operator]]) for part in weights)
        names = [f"{name}.{layer}" for name in ("W", "R", "B")]
        for name, tensor in zip(names, (w, r, torch.cat(biases)), strict=True):
            constants.append(helper.make_tensor(name, TensorProto.FLOAT, (1, *tensor.shape), tensor.flatten().tolist()))
        options: dict[str, Any] = {"linear_before_reset": 1} if operator == "GRU" else {}
        nodes.append(helper.make_node(operator, [below, *names], [f"Y.{layer}"], hidden_size=size, **options))
        below = f"output.{layer}" if layer + 1 < module.num_layers else "output"
        nodes.append(helper.make_node("Squeeze", [f"Y.{layer}", "axis"], [below]))
    shapes = [("T", "B", module.input_size), ("T", "B", size)]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(("x", "output"), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, operator, ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", onnx.OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=onnx.IR_VERSION).SerializeToString()


def onnx_runtime(model: str | bytes) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX model, or a file of one, on this process's threads: x to its first output."""
    import onnxruntime  # of skiprnn[onnx]

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"x": x.numpy()})[0])


def candidates(cell: str, shape, task, reference: bool) -> dict[str, Callable[[], Any]]:
    """What is measured on one shape: torch.nn first, everything else relative to it."""
    batch, steps, inputs, hidden, layers = shape
    x = torch.rand(batch, steps, inputs)
    found: dict[str, Callable[[], Any]] = {}

    def add(name: str, rnn: nn.Module, **options) -> None:
        found[name] = lambda: task(rnn, x, **options)

    plain = TORCH[cell](inputs, hidden, layers, batch_first=True)
    add("torch", plain)
    add("always", Recurrent(cell, "always", inputs, hidden, layers, engine="native", batch_first=True))
    for period, rate in RATES.items():
        rnn = skip_network(cell, shape, period)
        add(f"skip {rate}", rnn)
        if period > 1 and batch > 1:
            add(f"skip {rate} desynchronised", rnn, scattered=True)
        if task is infer and batch == 1:
            add(f"skip {rate}, bfloat16", skip_network(cell, shape, period).round_weights())
    if task is infer and HAS_ONNX:  # last, for it leaves little in the caches
        for period, rate in RATES.items() if batch == 1 else ():
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "network.onnx"
                skip_network(cell, shape, period).to_onnx(file)
                found[f"skip {rate}, ONNX Runtime"] = partial(onnx_runtime(str(file)), x)
        run = onnx_runtime(onnx_model(plain))
        found["ONNX Runtime"] = partial(run, x.transpose(0, 1).contiguous())
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
                    seconds = alternate(functions, arguments.repetitions, partial(progress.advance, bar))
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
                functions, arguments.repetitions, partial(progress.advance, bar)
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

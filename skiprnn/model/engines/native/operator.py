"""skiprnn::recurrence on a CPU: fills the C description of problem.h, and does the products of a wide x.

Shapes: B batch, T steps, I input, H hidden of a layer, P = H padded to 16, G gates, K state entries (LSTM 2, GRU 1).
"""

import ctypes
from collections.abc import Iterable
from ctypes import Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from skiprnn.model.engines.call import valid
from skiprnn.model.engines.native import build, memory
from skiprnn.model.engines.operator import (
    CELLS,
    KERNELS,
    POLICIES,
    WEIGHTS,
    Arriving,
    Gradients,
    Kernels,
    Outputs,
    Problem,
    shapes,
)

WIDE = 1 << 16  # size of a weight of x from which one large product beats many small ones


def _structure(name: str, **fields: str) -> type[Structure]:
    """A ctypes.Structure whose fields of one type are named in one string."""
    types = {"integers": c_int64, "real": c_double, "pointers": c_void_p}
    listed = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (Structure,), {"_fields_": listed})


# Mirrors of problem.h, field by field.
LayerStruct = _structure(
    "LayerStruct",
    integers="inputs hidden",
    pointers="weight_ih weight_hh bias gate_input gate_state gate_bias h0 c0 h c saved_h saved_c saved_z "
    "d_h d_c d_h0 d_c0 d_weight_ih d_weight_hh d_bias d_gate_input d_gate_state d_gate_bias",
)
ProblemStruct = _structure(
    "ProblemStruct",
    integers="cell policy batch steps layers threads alike",
    real="slope",
    pointers="layer x projected draw lengths policy_weight policy_bias q0 s0 output q s updates saved_gate "
    "d_output d_q d_s d_updates d_projected row_starts d_x d_policy_weight d_policy_bias d_q0 d_s0",
)


def padded(size: int) -> int:
    """Rows are padded to whole vectors."""
    return -(-size // 16) * 16


class _Description:
    """Fills the C description, and keeps the tensors whose pointers it holds alive.

    Raises:
        ValueError: a tensor that is not what the C++ side would take it for.
    """

    def __init__(self, problem: Problem):
        self.problem, self.hidden, self.entries = problem, problem.hidden, problem.entries
        self.batch, self.steps, self.inputs = problem.x.shape
        self.kept: list[Tensor] = []
        self.layers = (LayerStruct * len(self.hidden))()
        self.struct = ProblemStruct(
            cell=list(CELLS).index(problem.cell),
            policy=list(POLICIES).index(problem.policy),
            batch=self.batch,
            steps=self.steps,
            layers=len(self.hidden),
            threads=torch.get_num_threads(),
            alike=problem.states[0].shape[0] < self.batch,
            layer=ctypes.cast(self.layers, c_void_p),
        )
        self.point_inputs("", *problem.lists)
        if problem.policy == "selective":
            self.struct.slope = problem.policy_weights[3].item()
        self.point(self.struct, "x draw", [problem.x, problem.draw], problem.x.shape, self.decisions)
        self.point(self.struct, "lengths", [problem.lengths], (self.batch,), dtype=torch.int64)

    @property
    def decisions(self) -> tuple[int, ...]:
        """The shape of the updates, and of a draw."""
        return self.batch, self.steps, *(self.hidden[-1:] if self.problem.by_neuron else [])

    def point_inputs(self, d: str, states, weights, gate, policy_weights) -> None:
        """Let fields point to the inputs; with "d_" for d, those of the gradients to the inputs' gradients."""
        begin = 1 if self.struct.alike else self.batch
        below = self.inputs
        for index, (layer, hidden) in enumerate(zip(self.layers, self.hidden, strict=True)):
            layer.inputs, layer.hidden = below, hidden
            entries = states[self.entries * index : self.entries * (index + 1)]
            self.point(layer, f"{d}h0 {d}c0", entries, *[(begin, hidden)] * 2)
            rows = self.problem.gates * hidden
            three = weights[WEIGHTS * index : WEIGHTS * (index + 1)]
            self.point(layer, f"{d}weight_ih {d}weight_hh {d}bias", three, (rows, below), (rows, hidden), (rows,))
            below = hidden
        top = self.hidden[-1]
        if self.problem.policy == "skip":
            self.point(self.struct, f"{d}policy_weight {d}policy_bias", policy_weights, (top,), ())
            self.point(self.struct, f"{d}q0 {d}s0", gate, *[(begin,)] * 2)
        if self.problem.policy == "selective":
            names = f"{d}gate_input {d}gate_state {d}gate_bias"
            self.point(self.layers[0], names, policy_weights, (top, self.inputs), (top,), (top,))

    def point(self, struct: Structure, names: str, tensors: Iterable[Tensor | None], *shapes, dtype=None) -> None:
        """Let the fields `names` point to `tensors`, checked and made contiguous; dtype: x's, if none is given."""
        dtype = dtype or self.problem.x.dtype
        for name, tensor, shape in zip(names.split(), tensors, shapes, strict=False):
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
                found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(f"the native engine needs {name} as {dtype} {tuple(shape)} on the CPU; got {found}")
            self.kept.append(tensor.contiguous())
            setattr(struct, name, self.kept[-1].data_ptr())

    def point_states(self, names: str, flat: Tensor) -> None:
        """Let the layers' fields `names` point to their states in `flat`, the one tensor of all."""
        self.kept.append(flat.contiguous())
        start = self.kept[-1].data_ptr()
        for layer, hidden in zip(self.layers, self.hidden, strict=True):
            for name in names.split()[: self.entries]:
                setattr(layer, name, start)
                start += self.batch * hidden * flat.element_size()

    def point_saved(self, saved: Tensor, saved_gate: Tensor) -> None:
        """Lay h, c and z of every layer out in the one tensor `saved`."""
        start = 0
        for layer, hidden in zip(self.layers, self.hidden, strict=True):
            blocks = 1, self.entries - 1, self.problem.gates
            for name, count in zip(("saved_h", "saved_c", "saved_z"), blocks, strict=True):
                setattr(layer, name, saved.data_ptr() + start * saved.element_size())
                start += (self.steps + 1) * self.batch * count * padded(hidden)
        self.point(self.struct, "saved_gate", [saved_gate], saved_gate.shape)

    def run(self, name: str) -> None:
        """Run the C function `name` for the tensors' type."""
        function = getattr(build.load(), f"skiprnn_{name}_{str(self.problem.x.dtype).removeprefix('torch.')}")
        function(byref(self.struct))


def kept(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """The states and z before each update, and q and s; the projected x, if it is wide."""
    batch, steps, inputs = problem.x.shape
    columns = problem.blocks * padded(problem.hidden[0])
    projected = inputs * columns >= WIDE and (save or problem.policy not in ("random_steps", "skip"))
    wide = sum((problem.entries + problem.gates) * padded(size) for size in problem.hidden)
    return [
        ((steps + 1) * batch * wide if save else 0,),
        (2, steps + 1, batch) if save and problem.policy == "skip" else (0,),
        (batch, steps, columns) if projected else (0,),
    ]


def forward(problem: Problem, save: bool) -> Outputs:
    """Outputs; where states begin alike, what the sequences have in common is computed once."""
    x = problem.x
    outputs = Outputs(*(memory.empty(shape, x.dtype) for shape in shapes(problem, save)))
    description = _Description(problem)
    output, updates = outputs.output, outputs.updates
    description.point(description.struct, "output updates", [output, updates], output.shape, updates.shape)
    description.point_states("h c", outputs.final)
    if problem.policy == "skip":
        description.point(description.struct, "q s", outputs.final_gate, *[(description.batch,)] * 2)
    if save:
        description.point_saved(outputs.saved, outputs.saved_gate)
    if outputs.projected.numel():
        weight, bias = _projection(problem)
        torch.addmm(bias, x.reshape(-1, x.shape[2]), weight.T, out=outputs.projected.view(-1, weight.shape[0]))
        description.point(description.struct, "projected", [outputs.projected], outputs.projected.shape)
    description.run("forward")
    return outputs


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """The gradients of the inputs."""
    description, x = _Description(problem), problem.x
    struct, batch = description.struct, description.batch
    gradients = Gradients.empty(problem, needs_input)
    description.point_inputs("d_", *gradients[1:])
    description.point_saved(outputs.saved, outputs.saved_gate)
    given = [outputs.updates, arriving.updates, arriving.output]
    top = (batch, description.steps, description.hidden[-1])
    description.point(struct, "updates d_updates d_output", given, *[description.decisions] * 2, top)
    if arriving.final is not None:
        description.point_states("d_h d_c", arriving.final)
    if arriving.final_gate is not None:
        description.point(struct, "d_q d_s", arriving.final_gate, *[(batch,)] * 2)
    projected = outputs.projected
    if projected.numel():
        happened = _happened(problem, outputs.updates)
        d_projected = memory.empty((int(happened.sum()), projected.shape[2]), x.dtype)
        first = happened.sum(1).cumsum(0) - happened.sum(1)
        description.point(struct, "projected d_projected", [projected, d_projected], projected.shape, d_projected.shape)
        description.point(struct, "row_starts", [first], (batch,), dtype=torch.int64)
    elif needs_input:
        description.point(struct, "d_x", [gradients.x.zero_()], x.shape)
    if problem.policy == "selective":
        gradients.policy_weights[3].zero_()
    description.run("backward")
    if projected.numel():
        d_weight = (d_projected.T @ x[happened]).view(-1, padded(problem.hidden[0]), x.shape[2])
        d_weight = d_weight[:, : problem.hidden[0]]
        gradients.weights[0].copy_(d_weight[: problem.gates].reshape(gradients.weights[0].shape))
        if problem.policy == "selective":
            gradients.policy_weights[0].copy_(d_weight[problem.gates])
        if needs_input:
            gradients.x.zero_()[happened] = d_projected @ _projection(problem)[0]
    return gradients


def _projection(problem: Problem) -> tuple[Tensor, Tensor]:
    """The first layer's weight (X, I) and bias (X,) of x, blocks padded from H to P rows."""
    hidden = problem.hidden[0]
    weight, _, bias = problem.weights[:WEIGHTS]
    weight, bias = weight.view(problem.gates, hidden, -1), bias.view(problem.gates, hidden)
    if problem.policy == "selective":
        of_input, _, of_gate, _ = problem.policy_weights
        weight, bias = torch.cat([weight, of_input[None]]), torch.cat([bias, of_gate[None]])
    more = padded(hidden) - hidden
    weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
    return weight.flatten(0, 1), torch.nn.functional.pad(bias, (0, more)).flatten()


def _happened(problem: Problem, updates: Tensor) -> Tensor:
    """Where the engine computed candidates that count, (B, T)."""
    if not problem.by_neuron:
        return updates != 0
    if problem.lengths is None:
        return torch.ones(updates.shape[:2], dtype=torch.bool)
    return valid(problem.lengths, updates.shape[1])


KERNELS["native"] = Kernels(kept, forward, backward)

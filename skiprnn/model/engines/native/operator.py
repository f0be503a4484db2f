"""skiprnn::recurrence, the operator that a fast engine computes: one operation to autograd, torch.func, fake tensors.

Shapes: B batch, T steps, I input, H hidden of a layer, P = H padded to 16, G gates, K state entries (LSTM 2, GRU 1).
Per-layer arguments are flat lists, layer after layer.
"""

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from skiprnn.model.engines.native import build, memory

CELLS = {"lstm": (4, 2), "gru": (3, 1)}  # G, K; in the order of the C++ enumeration
POLICIES = ("always", "random_steps", "skip", "random_neurons", "selective")  # likewise
NEURON_POLICIES = POLICIES[3:]
WIDE = 1 << 16  # size of a weight of x from which one large product beats many small ones
WEIGHTS = 3  # weight_ih (G*H, I), weight_hh (G*H, H), bias (G*H)


def _structure(name: str, **fields: str) -> type[Structure]:
    """A ctypes.Structure whose fields of one type are named in one string."""
    types = {"integers": c_int64, "real": c_double, "pointers": c_void_p}
    listed = [(field, types[kind.rstrip("_0123456789")]) for kind, names in fields.items() for field in names.split()]
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


class _Problem:
    """Fills the C description. Keeps the tensors whose pointers it holds alive."""

    def __init__(self, cell: str, policy: str, x: Tensor, states, weights, gate, policy_weights, draw, lengths):
        self.gates, self.entries = CELLS[cell]
        self.x, self.policy = x.contiguous(), policy
        self.batch, self.steps, _ = x.shape
        self.hidden = [state.shape[1] for state in states[:: self.entries]]
        self.kept: list[Tensor] = []
        self.layers = (LayerStruct * len(self.hidden))()
        self.struct = ProblemStruct(
            cell=list(CELLS).index(cell),
            policy=POLICIES.index(policy),
            batch=self.batch,
            steps=self.steps,
            layers=len(self.hidden),
            threads=torch.get_num_threads(),
            alike=states[0].shape[0] < self.batch,
            layer=ctypes.cast(self.layers, c_void_p),
        )
        inputs = x.shape[2]
        for index, (layer, hidden) in enumerate(zip(self.layers, self.hidden, strict=True)):
            layer.inputs, layer.hidden = inputs, hidden
            self.point(layer, "weight_ih weight_hh bias", weights[WEIGHTS * index : WEIGHTS * (index + 1)])
            self.point(layer, "h0 c0", states[self.entries * index : self.entries * (index + 1)])
            if policy == "selective":
                self.point(layer, "gate_input gate_state gate_bias", policy_weights[:3])
            inputs = hidden
        if policy == "skip":
            self.point(self.struct, "policy_weight policy_bias", policy_weights)
            self.point(self.struct, "q0 s0", gate)
        if policy == "selective":
            self.struct.slope = policy_weights[3].item()
        self.point(self.struct, "x draw lengths", [x, draw, None if lengths is None else lengths.long()])

    def point(self, struct: Structure, names: str, tensors: Iterable[Tensor | None]) -> None:
        """Let the fields `names` point to `tensors`, made contiguous."""
        for name, tensor in zip(names.split(), tensors, strict=False):
            if tensor is not None:
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
            for name, blocks in zip(("saved_h", "saved_c", "saved_z"), (1, self.entries - 1, self.gates), strict=True):
                setattr(layer, name, saved.data_ptr() + start * saved.element_size())
                start += (self.steps + 1) * self.batch * blocks * padded(hidden)
        self.point(self.struct, "saved_gate", [saved_gate])

    def call(self, name: str) -> None:
        """Run the C function `name` for the tensors' type."""
        function = getattr(build.load(), f"skiprnn_{name}_{str(self.x.dtype).removeprefix('torch.')}")
        function(byref(self.struct))


def _shapes(cell: str, policy: str, x: Tensor, states, save: bool) -> list[tuple[int, ...]]:
    """The outputs' shapes."""
    gates, entries = CELLS[cell]
    batch, steps, _ = x.shape
    hidden = [state.shape[1] for state in states[::entries]]
    columns = _blocks(cell, policy) * padded(hidden[0])
    projected = x.shape[2] * columns >= WIDE and (save or policy not in ("random_steps", "skip"))
    wide = sum((entries + gates) * padded(size) for size in hidden)
    return [
        (batch, steps, hidden[-1]),
        (batch * entries * sum(hidden),),
        (2, batch) if policy == "skip" else (0,),
        (batch, steps, sum(hidden)) if policy in NEURON_POLICIES else (batch, steps),
        ((steps + 1) * batch * wide if save else 0,),
        (2, steps + 1, batch) if save and policy == "skip" else (0,),
        (batch, steps, columns) if projected else (0,),
    ]


def _compute(
    cell: str,
    policy: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    policy_weights: Sequence[Tensor],
    draw: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run whole sequences; a stack of layers for the policies that decide for all layers at once.

    Args:
        cell, policy: their names.
        x: (B, T, I). On a GPU all tensors have one more dimension in front: runs that share a launch.
        states: K per layer, (B, H); or (1, H), where all sequences begin with one state: then what they begin with in
            common is computed once, and x gets no gradient.
        weights: weight_ih, weight_hh, bias per layer.
        gate: Skip's q and s, (B,) each, or (1,) with such states; otherwise empty.
        policy_weights: Skip: w_p (H,), b_p (). Selective: W_i (H, I), w_u (H,), b (H,), slope ().
        draw: the policy's random decisions, (B, T) or (B, T, H).
        lengths: (B,) steps that count.
        save: keep what the backward pass needs.

    Returns:
        output (B, T, H); final states, flat, layer after layer; final gate (2, B); updates (B, T) or (B, T, H); two
        buffers for the backward pass, written as far as there were updates; x projected, if it is wide.
    """
    outputs = [memory.empty(shape, x.dtype) for shape in _shapes(cell, policy, x, states, save)]
    output, final, final_gate, updates, saved, saved_gate, projected = outputs
    problem = _Problem(cell, policy, x, states, weights, gate, policy_weights, draw, lengths)
    problem.point(problem.struct, "output updates", [output, updates])
    problem.point_states("h c", final)
    if policy == "skip":
        problem.point(problem.struct, "q s", final_gate)
    if save:
        problem.point_saved(saved, saved_gate)
    if projected.numel():
        weight, bias = _projection(cell, policy, weights, policy_weights)
        torch.addmm(bias, x.reshape(-1, x.shape[2]), weight.T, out=projected.view(-1, weight.shape[0]))
        problem.point(problem.struct, "projected", [projected])
    problem.call("forward")
    return output, final, final_gate, updates, saved, saved_gate, projected


recurrence = torch.library.custom_op("skiprnn::recurrence", _compute, mutates_args=(), device_types="cpu")


@recurrence.register_fake
def _(cell, policy, x, states, weights, gate, policy_weights, draw, lengths, save):
    if x.dim() == 4:  # packed runs, on a GPU
        from skiprnn.model.engines.triton.operator import shapes
    else:
        shapes = _shapes
    return tuple(x.new_empty(shape) for shape in shapes(cell, policy, x, states, save))


def split_states(final: Tensor, batch: int, hidden: Sequence[int], entries: int) -> list[tuple[Tensor, ...]]:
    """Each layer's states (B, H) from the flat tensor of all."""
    sizes = [batch * size for size in hidden for _ in range(entries)]
    parts = [part.view(batch, -1) if batch else part.view(0, 1) for part in final.split(sizes)]
    return [tuple(parts[start : start + entries]) for start in range(0, len(parts), entries)]


@torch.library.custom_op("skiprnn::recurrence_backward", mutates_args=(), device_types="cpu")
def recurrence_backward(
    cell: str,
    policy: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    policy_weights: Sequence[Tensor],
    draw: Tensor | None,
    lengths: Tensor | None,
    updates: Tensor,
    saved: Tensor,
    saved_gate: Tensor,
    projected: Tensor,
    d_output: Tensor | None,
    d_final: Tensor | None,
    d_gate: Tensor | None,
    d_updates: Tensor | None,
    needs_input: bool,
) -> list[Tensor]:
    """The gradients in x (empty unless needed), states, weights, gate and policy_weights, in one flat list."""
    problem = _Problem(cell, policy, x, states, weights, gate, policy_weights, draw, lengths)
    problem.point(problem.struct, "updates d_output d_updates", [updates, d_output, d_updates])
    problem.point_saved(saved, saved_gate)
    gradients = _empty_gradients(x, states, weights, gate, policy_weights, needs_input)
    d_x, d_states, d_weights, d_gates, d_policy = split_gradients(gradients, states, weights, gate)
    if projected.numel():
        happened = _happened(policy, updates, lengths)
        d_projected = memory.empty((int(happened.sum()), projected.shape[2]), x.dtype)
        row_starts = happened.sum(1).cumsum(0) - happened.sum(1)
        problem.point(problem.struct, "projected d_projected row_starts", [projected, d_projected, row_starts])
    elif needs_input:
        problem.point(problem.struct, "d_x", [d_x.zero_()])
    if d_final is not None:
        problem.point_states("d_h d_c", d_final)
    for index, layer in enumerate(problem.layers):
        problem.point(layer, "d_h0 d_c0", d_states[problem.entries * index : problem.entries * (index + 1)])
        problem.point(layer, "d_weight_ih d_weight_hh d_bias", d_weights[WEIGHTS * index : WEIGHTS * (index + 1)])
        if policy == "selective":
            problem.point(layer, "d_gate_input d_gate_state d_gate_bias", d_policy[:3])
    if policy == "selective":
        d_policy[3].zero_()
    if policy == "skip":
        problem.point(problem.struct, "d_policy_weight d_policy_bias", d_policy)
        problem.point(problem.struct, "d_q0 d_s0", d_gates)
        if d_gate is not None:
            problem.point(problem.struct, "d_q d_s", d_gate.contiguous())
    problem.call("backward")
    if projected.numel():
        d_weight = (d_projected.T @ x[happened]).view(-1, padded(problem.hidden[0]), x.shape[2])
        d_weight = d_weight[:, : problem.hidden[0]]
        d_weights[0].copy_(d_weight[: problem.gates].reshape(d_weights[0].shape))
        if policy == "selective":
            d_policy[0].copy_(d_weight[problem.gates])
        if needs_input:
            d_x.zero_()[happened] = d_projected @ _projection(cell, policy, weights, policy_weights)[0]
    return gradients


def _blocks(cell: str, policy: str) -> int:
    """What x is multiplied for: the gates, and Selective's decisions."""
    return CELLS[cell][0] + (policy == "selective")


def _projection(cell: str, policy: str, weights, policy_weights) -> tuple[Tensor, Tensor]:
    """The first layer's weight (X, I) and bias (X,) of x, blocks padded from H to P rows; 1 on the forget bias."""
    gates = CELLS[cell][0]
    weight, state_weight, bias = weights[:WEIGHTS]
    hidden = state_weight.shape[1]
    weight, bias = weight.view(gates, hidden, -1), bias.view(gates, hidden)
    if cell == "lstm":
        bias = bias + torch.tensor([0, 0, 1, 0], dtype=bias.dtype).unsqueeze(1)
    if policy == "selective":
        weight, bias = torch.cat([weight, policy_weights[0][None]]), torch.cat([bias, policy_weights[2][None]])
    more = padded(hidden) - hidden
    weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
    return weight.flatten(0, 1), torch.nn.functional.pad(bias, (0, more)).flatten()


def _happened(policy: str, updates: Tensor, lengths: Tensor | None) -> Tensor:
    """Where the engine computed candidates that count, (B, T)."""
    if policy not in NEURON_POLICIES:
        return updates != 0
    batch, steps, _ = updates.shape
    happened = torch.ones(batch, steps, dtype=torch.bool)
    return happened if lengths is None else torch.arange(steps) < lengths.unsqueeze(1)


def _empty_gradients(x, states, weights, gate, policy_weights, needs_input: bool) -> list[Tensor]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_input else x.new_empty(0)
    return [d_x, *(t.new_empty(t.shape) for t in (*states, *weights, *gate, *policy_weights))]


@recurrence_backward.register_fake
def _(
    cell, policy, x, states, weights, gate, policy_weights, draw, lengths, updates, saved, saved_gate, projected, *rest
):
    return _empty_gradients(x, states, weights, gate, policy_weights, rest[-1])


def split_gradients(gradients: list[Tensor], states, weights, gate) -> tuple[Tensor, list, list, list, list]:
    """The flat list of gradients as x's and the four lists'."""
    first, second = 1 + len(states), 1 + len(states) + len(weights)
    third = second + len(gate)
    return gradients[0], gradients[1:first], gradients[first:second], gradients[second:third], gradients[third:]


def _save(ctx, inputs, output) -> None:
    cell, policy, x, states, weights, gate, policy_weights, draw, lengths, save = inputs
    if not save:
        raise RuntimeError("skiprnn::recurrence needs save=True where a gradient is wanted")
    ctx.names = cell, policy
    ctx.counts = len(states), len(weights), len(gate), len(policy_weights)
    kept = [tensor.detach() for tensor in output[3:]]  # updates, saved, saved_gate, projected
    ctx.save_for_backward(x, *states, *weights, *gate, *policy_weights, draw, lengths, *kept)
    ctx.set_materialize_grads(False)


def _gradients(names, counts, needs_input: bool, x, *tensors) -> list[Tensor]:
    """recurrence_backward, from all its tensors in one list."""
    return torch.ops.skiprnn.recurrence_backward(*names, x, *_lists(counts, tensors), needs_input)


def _lists(counts: Sequence[int], tensors: Sequence) -> list:
    """The operator's four lists of tensors, as long as `counts` says, and what follows them."""
    tensors, found = list(tensors), []
    for count in counts:
        found.append(tensors[:count])
        tensors = tensors[count:]
    return [*found, *tensors]


def _differentiate(ctx, d_output, d_final, d_gate, d_updates, *_, needs_input=None, gradients_of=_gradients):
    needs_input = ctx.needs_input_grad[2] if needs_input is None else needs_input
    x, *tensors = ctx.saved_tensors
    if needs_input and tensors[0].shape[-2] < x.shape[-3]:
        raise RuntimeError("skiprnn::recurrence needs a state for each sequence where x has a gradient")
    given = d_output, d_final, d_gate, d_updates
    gradients = gradients_of(ctx.names, ctx.counts, needs_input, x, *tensors, *given)
    d_x, d_states, d_weights, d_gates, d_policy = split_gradients(list(gradients), *_lists(ctx.counts, tensors)[:3])
    return None, None, d_x if d_x.numel() else None, d_states, d_weights, d_gates, d_policy, None, None, None


recurrence.register_autograd(_differentiate, setup_context=_save)


class _Flat(torch.autograd.Function):
    """The operator for torch.func's transforms, which don't see through operators with lists of tensors."""

    @staticmethod
    def forward(names, counts, save, x, *tensors):
        return torch.ops.skiprnn.recurrence(*names, x, *_lists(counts, tensors), save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        names, counts, save, x, *tensors = inputs
        _save(ctx, (*names, x, *_lists(counts, tensors), save), output)

    @staticmethod
    def backward(ctx, *gradients):
        needs_input = ctx.needs_input_grad[3]
        result = _differentiate(ctx, *gradients, needs_input=needs_input, gradients_of=_FlatGradients.apply)
        _, _, d_x, *lists, _, _, _ = result
        return None, None, None, d_x, *(gradient for part in lists for gradient in part), None, None


class _FlatGradients(torch.autograd.Function):
    """recurrence_backward likewise."""

    @staticmethod
    def forward(names, counts, needs_input, x, *tensors):
        return tuple(_gradients(names, counts, needs_input, x, *tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("the native engine has no second derivatives; engine='reference' has")


def apply(cell: str, policy: str, x: Tensor, states, weights, gate, policy_weights, draw, lengths, save: bool):
    """The operator, also under torch.func's transforms."""
    lists = states, weights, gate, policy_weights
    if not torch._C._are_functorch_transforms_active():
        plain = not save and type(x) is Tensor and x.is_cpu and x.dim() == 3 and not torch.compiler.is_compiling()
        run = _compute if plain else recurrence  # the dispatcher takes longer than a short sequence
        return run(cell, policy, x, *lists, draw, lengths, save)
    counts = [len(part) for part in lists]
    return _Flat.apply((cell, policy), counts, save, x, *(t for part in lists for t in part), draw, lengths)

"""skiprnn::recurrence: the time loop as one operation to autograd, torch.func and fake tensors.

An engine that computes it puts its kernels into KERNELS. Per-layer arguments are flat lists, layer by layer.
Shapes: B batch, T steps, I input, H hidden of a layer, G gates, K state entries (LSTM 2, GRU 1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from skiprnn.model.cells import Cell
from skiprnn.model.engines import call as known
from skiprnn.model.policies import Policy

CELLS: dict[str, type[Cell]] = {cell.name: cell for cell in known.CELLS}
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in known.POLICIES}
WEIGHTS = 3  # per layer: weight_ih (G*H, I), weight_hh (G*H, H), total_bias (G*H,)


class Problem(NamedTuple):
    """What both passes are given. On a GPU all tensors have one more dimension in front: runs that share a launch."""

    engine: str  # a key of KERNELS
    cell: str
    policy: str
    x: Tensor  # (B, T, I)
    states: Sequence[Tensor]  # K per layer, (B, H); or (1, H) where all sequences begin alike, then x gets no gradient
    weights: Sequence[Tensor]  # WEIGHTS per layer
    gate: Sequence[Tensor]  # Skip's q and s, (B,) each, or (1,) with such states; otherwise empty
    policy_weights: Sequence[Tensor]  # Skip: w_p (H,), b_p (). Selective: W_i (H, I), w_u (H,), b (H,), slope ()
    draw: Tensor | None  # the policy's random decisions, (B, T) or (B, T, H)
    lengths: Tensor | None  # (B,): steps that count

    @property
    def gates(self) -> int:
        """G."""
        return len(CELLS[self.cell].gates)

    @property
    def entries(self) -> int:
        """K."""
        return len(CELLS[self.cell].state_names)

    @property
    def hidden(self) -> list[int]:
        """H of every layer."""
        return [state.shape[-1] for state in self.states[:: self.entries]]

    @property
    def blocks(self) -> int:
        """Blocks of H pre-activations: of the gates, and of Selective's coordinator."""
        return self.gates + (self.policy == "selective")

    @property
    def by_neuron(self) -> bool:
        """Whether every neuron decides for itself."""
        return POLICIES[self.policy].family == "neuron"

    @property
    def lists(self) -> tuple[Sequence[Tensor], ...]:
        """The four lists of tensors that may have a gradient."""
        return self.states, self.weights, self.gate, self.policy_weights

    @property
    def counts(self) -> list[int]:
        """How many tensors each list has."""
        return [len(part) for part in self.lists]

    @property
    def tensors(self) -> list[Tensor]:
        """Those of all lists, one after the other."""
        return [tensor for part in self.lists for tensor in part]

    def split(self, final: Tensor) -> list[Tensor]:
        """Outputs.final, or its gradient, as the K states (B, H) of each layer."""
        batch = self.x.shape[-3]
        sizes = [hidden for hidden in self.hidden for _ in range(self.entries)]
        parts = final.split([batch * size for size in sizes], -1)
        return [part.unflatten(-1, (batch, size)) for part, size in zip(parts, sizes, strict=True)]


class Outputs(NamedTuple):
    """What forward computes; the last three are the engine's own, for its backward."""

    output: Tensor  # (B, T, H)
    final: Tensor  # the states after the last step that counts, flat, layer by layer
    final_gate: Tensor  # (2, B); empty unless the policy is Skip
    updates: Tensor  # (B, T) or (B, T, H)
    saved: Tensor
    saved_gate: Tensor
    projected: Tensor

    @classmethod
    def empty(cls, problem: Problem, save: bool) -> "Outputs":
        """Uninitialised ones."""
        return cls(*(problem.x.new_empty(shape) for shape in shapes(problem, save)))


class Arriving(NamedTuple):
    """Gradients of the outputs; None where there is none."""

    output: Tensor | None
    final: Tensor | None
    final_gate: Tensor | None
    updates: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the inputs, as in Problem; x's is empty unless asked for."""

    x: Tensor
    states: list[Tensor]
    weights: list[Tensor]
    gate: list[Tensor]
    policy_weights: list[Tensor]

    @classmethod
    def empty(cls, problem: Problem, of_x: bool) -> "Gradients":
        """Uninitialised ones."""
        x = problem.x
        first = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else x.new_empty(0)
        return cls(first, *([tensor.new_empty(tensor.shape) for tensor in part] for part in problem.lists))

    @classmethod
    def of(cls, flat: Sequence[Tensor], problem: Problem) -> "Gradients":
        """From one list of all; an operator's results are contiguous and share no memory."""
        own = [gradient.clone(memory_format=torch.contiguous_format) for gradient in flat]
        return cls(own[0], *_cut(own[1:], problem.counts))

    @property
    def flat(self) -> list[Tensor]:
        """All in one list."""
        return [self.x, *(tensor for part in self[1:] for tensor in part)]


class Kernels(NamedTuple):
    """How an engine computes the operator; backward gets the last four of Outputs, the others empty."""

    kept: Callable[[Problem, bool], Sequence[tuple[int, ...]]]  # shapes of the last three of Outputs
    forward: Callable[[Problem, bool], Outputs]  # True: keep what backward needs
    backward: Callable[[Problem, Outputs, Arriving, bool], Gradients]  # True: x's gradient as well


KERNELS: dict[str, Kernels] = {}


def shapes(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """The outputs' shapes."""
    *runs, batch, steps, _ = problem.x.shape
    rows, top = (*runs, batch, steps), problem.hidden[-1]
    return [
        (*rows, top),
        (*runs, batch * problem.entries * sum(problem.hidden)),
        (*runs, 2, batch) if problem.policy == "skip" else (0,),
        (*rows, top) if problem.by_neuron else rows,
        *KERNELS[problem.engine].kept(problem, save),
    ]


@torch.library.custom_op("skiprnn::recurrence", mutates_args=())
def recurrence(
    engine: str,
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
    """Run whole sequences, of a stack of layers where one policy decides for all at once: Problem -> Outputs."""
    problem = Problem(engine, cell, policy, x, states, weights, gate, policy_weights, draw, lengths)
    return KERNELS[engine].forward(problem, save)


@recurrence.register_fake
def _(*arguments):
    *inputs, save = arguments
    return tuple(Outputs.empty(Problem(*inputs), save))


@torch.library.custom_op("skiprnn::recurrence_backward", mutates_args=())
def recurrence_backward(
    engine: str,
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
    """The gradients of all inputs in one list."""
    problem = Problem(engine, cell, policy, x, states, weights, gate, policy_weights, draw, lengths)
    nothing = x.new_empty(0)
    outputs = Outputs(nothing, nothing, nothing, updates, saved, saved_gate, projected)
    arriving = Arriving(d_output, d_final, d_gate, d_updates)
    return KERNELS[engine].backward(problem, outputs, arriving, needs_input).flat


@recurrence_backward.register_fake
def _(*arguments):
    return Gradients.empty(Problem(*arguments[:10]), arguments[-1]).flat


def _cut(tensors: Sequence, counts: Sequence[int]) -> list[list]:
    """Lists as long as `counts` says, one after the other."""
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return [list(tensors[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _save(ctx, inputs, output) -> None:
    *arguments, save = inputs
    problem = Problem(*arguments)
    if not save:
        raise RuntimeError("skiprnn::recurrence needs save=True where a gradient is wanted")
    ctx.names, ctx.counts = problem[:3], problem.counts
    kept = [tensor.detach() for tensor in output[3:]]
    ctx.save_for_backward(problem.x, *problem.tensors, problem.draw, problem.lengths, *kept)
    ctx.set_materialize_grads(False)


def _gradients(names, counts, needs_input: bool, x, *tensors) -> list[Tensor]:
    """recurrence_backward, from all its tensors in one list."""
    after = sum(counts)
    return torch.ops.skiprnn.recurrence_backward(*names, x, *_cut(tensors, counts), *tensors[after:], needs_input)


def _differentiate(ctx, d_output, d_final, d_gate, d_updates, *_, needs_input=None, gradients_of=_gradients):
    needs_input = ctx.needs_input_grad[3] if needs_input is None else needs_input
    x, *tensors = ctx.saved_tensors
    if needs_input and tensors[0].shape[-2] < x.shape[-3]:
        raise RuntimeError("skiprnn::recurrence needs a state for each sequence where x has a gradient")
    given = d_output, d_final, d_gate, d_updates
    d_x, *rest = gradients_of(ctx.names, ctx.counts, needs_input, x, *tensors, *given)
    return None, None, None, d_x if d_x.numel() else None, *_cut(rest, ctx.counts), None, None, None


recurrence.register_autograd(_differentiate, setup_context=_save)


def _no_second(ctx, *gradients) -> NoReturn:
    raise RuntimeError("the fast engines have no second derivatives; engine='reference' has")


recurrence_backward.register_autograd(_no_second)


def _one_by_one(function: type[torch.autograd.Function], info, in_dims, arguments) -> tuple[tuple, tuple]:
    """vmap of an operator: it has its own batch, so what is mapped over (sequences, weights) comes one by one."""
    results = []
    for index in range(info.batch_size):
        results.append(
            function.apply(
                *(
                    argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
        )
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


class _Flat(torch.autograd.Function):
    """The operator for torch.func's transforms, which don't see through operators with lists of tensors."""

    @staticmethod
    def forward(names, counts, save, x, *tensors):
        after = sum(counts)
        return torch.ops.skiprnn.recurrence(*names, x, *_cut(tensors, counts), *tensors[after:], save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        names, counts, save, x, *tensors = inputs
        _save(ctx, (*names, x, *_cut(tensors, counts), *tensors[sum(counts) :], save), output)

    @staticmethod
    def backward(ctx, *gradients):
        needs_input = ctx.needs_input_grad[3]
        result = _differentiate(ctx, *gradients, needs_input=needs_input, gradients_of=_FlatGradients.apply)
        d_x, *lists = result[3:8]
        return None, None, None, d_x, *(gradient for part in lists for gradient in part), None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _one_by_one(_Flat, info, in_dims, arguments)


class _FlatGradients(torch.autograd.Function):
    """recurrence_backward likewise."""

    @staticmethod
    def forward(names, counts, needs_input, x, *tensors):
        return tuple(_gradients(names, counts, needs_input, x, *tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_no_second)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _one_by_one(_FlatGradients, info, in_dims, arguments)


def needs_gradient(problem: Problem) -> bool:
    """Whether forward has to keep what backward needs."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (problem.x, *problem.tensors))


def apply(problem: Problem, save: bool) -> Outputs:
    """The operator, also under torch.func's transforms."""
    x, tensors = problem.x, problem.tensors
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in (x, *tensors)
    ):
        raise RuntimeError("the fast engines have no forward-mode derivatives; engine='reference' has")
    if torch._C._are_functorch_transforms_active():
        return Outputs(*_Flat.apply(problem[:3], problem.counts, save, x, *tensors, problem.draw, problem.lengths))
    if not save and type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling():
        return KERNELS[problem.engine].forward(problem, save)  # the dispatcher takes longer than a short sequence
    return Outputs(*recurrence(*problem, save))

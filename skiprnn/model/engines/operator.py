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
from skiprnn.model.engines.call import Call, Result
from skiprnn.model.policies import Policy, RandomNeurons, Selective, Skip

CELLS: dict[str, type[Cell]] = {cell.name: cell for cell in known.CELLS}
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in known.POLICIES}
PIECES = 64  # of a sequence, at most, that a weight's gradient is summed from
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
    def by_neuron(self) -> bool:
        """Whether every neuron decides for itself."""
        return POLICIES[self.policy].family == "neuron"

    @property
    def lists(self) -> tuple[Sequence[Tensor], ...]:
        """The four lists of tensors that may have a gradient."""
        return self.states, self.weights, self.gate, self.policy_weights


class Outputs(NamedTuple):
    """What forward computes; the last three are the engine's own, for its backward."""

    output: Tensor  # (B, T, H)
    final: Tensor  # the states after the last step that counts, flat, layer by layer
    final_gate: Tensor  # (2, B); empty unless the policy is Skip
    updates: Tensor  # (B, T) or (B, T, H)
    saved: Tensor
    saved_gate: Tensor
    projected: Tensor


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
        """From one list of all."""
        return cls(flat[0], *_cut(flat[1:], [len(part) for part in problem.lists]))

    @property
    def flat(self) -> list[Tensor]:
        """All in one list."""
        return [self.x, *(tensor for part in self[1:] for tensor in part)]


class Kernels(NamedTuple):
    """How an engine computes the operator; backward gets the last four of Outputs, the others empty."""

    shapes: Callable[[Problem, bool], Sequence[tuple[int, ...]]]  # of the outputs
    forward: Callable[[Problem, bool], Outputs]  # True: keep what backward needs
    backward: Callable[[Problem, Outputs, Arriving, bool], Gradients]  # True: x's gradient as well


KERNELS: dict[str, Kernels] = {}


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
    problem = Problem(*inputs)
    return tuple(problem.x.new_empty(shape) for shape in KERNELS[problem.engine].shapes(problem, save))


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
    ctx.names = problem[:3]
    ctx.counts = [len(part) for part in problem.lists]
    tensors = [tensor for part in problem.lists for tensor in part]
    kept = [tensor.detach() for tensor in output[3:]]
    ctx.save_for_backward(problem.x, *tensors, problem.draw, problem.lengths, *kept)
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


def apply(problem: Problem, save: bool) -> Outputs:
    """The operator, also under torch.func's transforms."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in (problem.x, *(tensor for part in problem.lists for tensor in part))
    ):
        raise RuntimeError("the fast engines have no forward-mode derivatives; engine='reference' has")
    if torch._C._are_functorch_transforms_active():
        counts = [len(part) for part in problem.lists]
        tensors = [tensor for part in problem.lists for tensor in part]
        return Outputs(*_Flat.apply(problem[:3], counts, save, problem.x, *tensors, problem.draw, problem.lengths))
    x = problem.x
    if not save and type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling():
        return KERNELS[problem.engine].forward(problem, save)  # the dispatcher takes longer than a short sequence
    return Outputs(*recurrence(*problem, save))


# --- between calls and the operator ---


def needs_gradient(problem: Problem) -> bool:
    """Whether forward has to keep what backward needs."""
    if not torch.is_grad_enabled():
        return False
    return problem.x.requires_grad or any(tensor.requires_grad for part in problem.lists for tensor in part)


def problem_of(engine: str, call: Call, policy_weights: list[Tensor]) -> Problem:
    """A call as the operator takes it."""
    states = [entry for state in call.states for entry in state]
    weights = [weight for cell in call.cells for weight in (cell.weight_ih, cell.weight_hh, cell.total_bias)]
    gate = [part.reshape(-1) for part in call.gate]
    names = engine, call.cells[0].name, call.policy.name
    return Problem(*names, call.x, states, weights, gate, policy_weights, call.draw, call.lengths)


def result_of(call: Call, outputs: Outputs) -> Result:
    """The operator's outputs as a call's result."""
    batch, entries = call.x.shape[0], len(call.states[0])
    sizes = [cell.hidden_size for cell in call.cells for _ in range(entries)]
    flat = outputs.final.split([batch * size for size in sizes])
    parts = [part.view(batch, size) for part, size in zip(flat, sizes, strict=True)]
    states = [tuple(parts[start : start + entries]) for start in range(0, len(parts), entries)]
    gate = tuple(part.unsqueeze(1) for part in outputs.final_gate) if call.gate else call.gate
    updates = outputs.updates if call.policy.learned else outputs.updates.detach()
    return Result(outputs.output, states, gate, updates)


def run_stacked(engine: str, calls: Sequence[Call], policy_weights: Sequence[list[Tensor]]) -> list[Result]:
    """The operator on all calls' tensors, stacked (R, ...)."""
    problems = [problem_of(engine, call, weights) for call, weights in zip(calls, policy_weights, strict=True)]
    save = any(needs_gradient(problem) for problem in problems)
    outputs = apply(_stacked(problems), save)
    gates = outputs.final_gate if calls[0].gate else [outputs.final_gate] * len(calls)
    each = zip(outputs.output, outputs.final, gates, outputs.updates, strict=True)
    return [result_of(call, Outputs(*own, *outputs[4:])) for call, own in zip(calls, each, strict=True)]


def _stacked(problems: Sequence[Problem]) -> Problem:
    """One problem of several of equal shapes."""

    def stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
        there = [tensor.to(problems[0].x.device) for tensor in tensors if tensor is not None]
        return torch.stack(there) if there else None

    def stack_lists(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.stack(tensors) for tensors in zip(*lists, strict=True)]

    return problems[0]._replace(
        x=torch.stack([problem.x for problem in problems]),
        states=stack_lists([problem.states for problem in problems]),
        weights=stack_lists([problem.weights for problem in problems]),
        gate=stack_lists([problem.gate for problem in problems]),
        policy_weights=stack_lists([problem.policy_weights for problem in problems]),
        draw=stack([problem.draw for problem in problems]),
        lengths=stack([problem.lengths for problem in problems]),
    )


def summed_product(rows: Tensor, columns: Tensor) -> Tensor:
    """The gradient of a weight: rows^T columns over all steps and sequences, (R, T, B, K), (R, T, B, X) -> (R, K, X).

    In pieces of a few steps: of one long sum that makes few outputs, libraries keep most of a GPU idle.
    """
    runs, steps = rows.shape[:2]
    pieces = max(count for count in range(1, min(steps, PIECES) + 1) if steps % count == 0)
    left, right = (part.reshape(runs * pieces, -1, part.shape[-1]) for part in (rows, columns))
    return product(left.mT, right).view(runs, pieces, left.shape[-1], right.shape[-1]).sum(1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices (R, ., .), each run's; of bfloat16 ones in float32."""
    if left.dtype != torch.bfloat16:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, as kernels read it."""
    return None if tensor is None else tensor.contiguous()


def by_layers(calls: Sequence[Call], run: Callable[[Sequence[Call], list[list[Tensor]]], list[Result]]) -> list[Result]:
    """Networks of one architecture by `run`, which takes stacks that the operator takes, and their policies' weights.

    Only Skip's gate ties the layers together; otherwise they run one after the other.
    """
    if isinstance(calls[0].policy, Skip):
        return run(calls, [_weights(call.policy, 0) for call in calls])
    xs = [call.x for call in calls]
    by_layer: list[list[Result]] = []
    for layer, cell in enumerate(calls[0].cells):
        below = sum(cell.hidden_size for cell in calls[0].cells[:layer])
        parts = [
            call._replace(
                cells=[call.cells[layer]],
                x=x,
                states=[call.states[layer]],
                draw=call.draw[..., below : below + cell.hidden_size]
                if isinstance(call.policy, RandomNeurons) and call.draw is not None
                else call.draw,
            )
            for call, x in zip(calls, xs, strict=True)
        ]
        by_layer.append(run(parts, [_weights(call.policy, layer) for call in calls]))
        xs = [result.output for result in by_layer[-1]]
        if layer < len(calls[0].masks):
            xs = [x * call.masks[layer] for x, call in zip(xs, calls, strict=True)]
    return [
        Result(
            layers[-1].output,
            [state for result in layers for state in result.states],
            call.gate,
            torch.cat([result.updates for result in layers], -1)
            if call.policy.family == "neuron"
            else layers[0].updates,
        )
        for call, layers in zip(calls, zip(*by_layer, strict=True), strict=True)
    ]


def _weights(policy: Policy, layer: int) -> list[Tensor]:
    """What of the policy the operator takes for one layer, or of Skip for all."""
    if isinstance(policy, Skip):
        return [policy.weight, policy.bias.squeeze(0)]
    if isinstance(policy, Selective):
        coordinator = policy.coordinators[layer]
        return [coordinator.weight_input, coordinator.weight_state, coordinator.bias, policy.slope]
    return []

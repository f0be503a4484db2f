"""Several runs in one launch: networks of one architecture and batches of one shape as one problem (R, ...), and what
the engines share whose kernels take these.

Shapes: R runs, B batch, T steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skiprnn.model.engines.call import Call, Result
from skiprnn.model.engines.operator import Outputs, Problem, apply, needs_gradient
from skiprnn.model.engines.problems import by_layers, problem_of, result_of

PIECES = 64  # of a sequence, at most, that a weight's gradient is summed from


def run_packed(engine: str, calls: Sequence[Call]) -> list[Result]:
    """Several networks of one cell, policy and size on batches of one shape."""
    return by_layers(calls, lambda stacks, layer: _run(engine, stacks, layer))


def _run(engine: str, calls: Sequence[Call], layer: int) -> list[Result]:
    problems = [problem_of(engine, call, layer) for call in calls]
    save = any(needs_gradient(problem) for problem in problems)
    outputs = apply(stacked(problems), save)
    gates = outputs.final_gate if calls[0].gate else [outputs.final_gate] * len(calls)
    each = zip(outputs.output, outputs.final, gates, outputs.updates, strict=True)
    return [
        result_of(call, problem, Outputs(*own, *outputs[4:]))
        for call, problem, own in zip(calls, problems, each, strict=True)
    ]


def stacked(problems: Sequence[Problem]) -> Problem:
    """One problem of several of equal shapes, (R, ...) each tensor."""

    def stack(parts: Sequence) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.stack(list(parts))
        if isinstance(parts[0], list):
            return [stack(tensors) for tensors in zip(*parts, strict=True)]
        return parts[0]

    return Problem(*map(stack, zip(*problems, strict=True)))


def kept_shapes(problem: Problem, save: bool, elements: int) -> list[tuple[int, ...]]:
    """Kernels.kept of an engine that saves so many elements, and Skip's q, s and proposed next q at every step."""
    runs, batch, steps, _ = problem.x.shape
    gate = (runs, steps, 3, batch) if save and problem.policy == "skip" else (0,)
    return [(elements if save else 0,), gate, (0,)]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, as kernels read it."""
    return None if tensor is None else tensor.contiguous()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices (R, ., .), each run's; of bfloat16 ones in float32."""
    if left.dtype != torch.bfloat16:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def summed_product(rows: Tensor, columns: Tensor) -> Tensor:
    """The gradient of a weight: rows^T columns over all steps and sequences, (R, T, B, K), (R, T, B, X) -> (R, K, X).

    In pieces of a few steps: of one long sum that makes few outputs, libraries keep most of a GPU idle.
    """
    runs, steps = rows.shape[:2]
    pieces = max(count for count in range(1, min(steps, PIECES) + 1) if steps % count == 0)
    left, right = (part.reshape(runs * pieces, -1, part.shape[-1]) for part in (rows, columns))
    return product(left.mT, right).view(runs, pieces, left.shape[-1], right.shape[-1]).sum(1)


def of_input(d_pre: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, (R, T, B, X), (R, X, I) -> (R, B, T, I)."""
    return product(d_pre.flatten(1, 2), weight).unflatten(1, d_pre.shape[1:3]).transpose(1, 2)

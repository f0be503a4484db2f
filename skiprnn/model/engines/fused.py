"""The batched engine, its steps compiled by torch's compiler: a step is its products and few kernels besides.

A variant takes seconds to compile, anew for each shape: for training, not for batches of ever other sizes.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from skiprnn.model.cells import Cell
from skiprnn.model.engines import batched
from skiprnn.model.engines.call import Call, Result
from skiprnn.model.engines.operator import KERNELS, Kernels, by_layers, run_stacked
from skiprnn.model.policies import Policy

_compiled: dict[Hashable, Callable] = {}


def unsupported(cells: Sequence[Cell], policy: Policy, x: Tensor) -> str | None:
    """Why the engine does not serve; None if it does."""
    return batched.unsupported(cells, policy, x)


def run(call: Call) -> Result:
    """As reference.run."""
    return run_packed([call])[0]


def run_packed(calls: Sequence[Call]) -> list[Result]:
    """As batched.run_packed."""
    return by_layers(calls, lambda calls, weights: run_stacked("fused", calls, weights))


def _fused(function: Callable[..., None], *arguments: Any) -> None:
    """A step, compiled for what it is given."""
    leaves, structure = pytree.tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    kinds = tuple((leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    key = (function.__name__, tensors[0].device, tensors[0].dtype, kinds, structure)
    if key not in _compiled:
        _compiled[key] = _compile(function, leaves, structure)
    _compiled[key](*tensors)


def _compile(function: Callable[..., None], leaves: Sequence[Any], structure: pytree.TreeSpec) -> Callable:
    """The function of the leaves that are tensors. They overlap nowhere, and begin at any address."""
    import torch._inductor  # here, for they take long to import
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(*tensors: Tensor) -> tuple[()]:
        given = list(leaves)
        for number, tensor in zip(places, tensors, strict=True):
            given[number] = tensor
        function(*pytree.tree_unflatten(given, structure))
        return ()

    with FakeTensorMode(), torch.no_grad():
        examples: list[Any] = []
        for number in places:
            leaf = leaves[number]
            reach = 2 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
            memory = torch.empty(reach, dtype=leaf.dtype, device=leaf.device)
            examples.append(memory.as_strided(leaf.shape, leaf.stride(), 1))
        graph = make_fx(of_tensors)(*examples)
        return torch._inductor.compile(graph, examples)


KERNELS["fused"] = Kernels(
    batched.shapes,
    partial(batched.forward, step=partial(_fused, batched.forward_step)),
    partial(batched.backward, step=partial(_fused, batched.backward_step)),
)

"""Steps as CUDA graphs: what the host does for a step once, it does not do again."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Given = Sequence[Tensor | None]


class Recorder:
    """Calls functions of tensors that return nothing, but change what they hold, in the memory where it is.

    On a GPU a function is run the first time that it is given such shapes, which warms everything up; recorded the
    second time; and replayed from then on, on copies of the tensors in the place of the first ones. All in a stream of
    its own; the caller's waits for it at `join`, which comes before the next call. On other devices a function is just
    called.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if on_gpu else None
        self.pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self.places: dict[Hashable, list[Tensor | None]] = {}  # where a graph reads its tensors
        self.graphs: dict[Hashable, Any] = {}

    def __call__(self, function: Callable[[Given], None], tensors: Given, name: Hashable) -> None:
        """Call it.

        Args:
            function: draws no random numbers and reads nothing back, for a graph does neither.
            tensors: what it is given.
            name: tells it from others, also from itself with other numbers from elsewhere.
        """
        if self.stream is None:
            function(tensors)
            return
        key = (name, tuple(None if tensor is None else tensor.shape for tensor in tensors))
        new = key not in self.places
        if new:
            self.places[key] = [None if tensor is None else tensor.clone() for tensor in tensors]
        else:
            into, given = ([tensor for tensor in some if tensor is not None] for some in (self.places[key], tensors))
            torch._foreach_copy_(into, given)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if new:
                function(self.places[key])
                return
            if key not in self.graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    function(self.places[key])
                self.graphs[key] = graph
            self.graphs[key].replay()

    def join(self) -> None:
        """Let what the caller does next on the GPU wait for what was called."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

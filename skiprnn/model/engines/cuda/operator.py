"""skiprnn::recurrence by the CUDA kernels: what they read and write, the products after the time loop.

Every tensor has a leading dimension R, the runs that share a launch. Other shapes: see kernels.cu.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skiprnn.model.engines.cuda import nvrtc
from skiprnn.model.engines.operator import KERNELS, POLICIES, Arriving, Gradients, Kernels, Outputs, Problem
from skiprnn.model.engines.runs import contiguous, kept_shapes, of_input, summed_product

SOURCE = Path(__file__).with_name("kernels.cu")
ROWS = 16  # sequences of a block
LARGEST = 128  # columns [h, x, 1]: more weights than that do not fit the registers
POINTERS = (
    "x draw lengths weights w_p b_p coordinator slope states gate output updates kept read reset kept_gate d_output"
    " d_updates d_pre d_w_p d_b_p"
)
SIZES = "B T"


class Arguments(ctypes.Structure):
    """As in kernels.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        *((name, ctypes.c_int) for name in SIZES.split()),
    ]


class Layout(NamedTuple):
    """Sizes of a problem; see kernels.cu."""

    runs: int
    batch: int
    steps: int
    inputs: int
    hidden: int
    gates: int
    blocks: int
    cell: str
    policy: str

    @classmethod
    def of(cls, problem: Problem) -> "Layout":
        runs, batch, steps, inputs = problem.x.shape
        counts = problem.gates, problem.blocks
        return cls(runs, batch, steps, inputs, problem.hidden[0], *counts, problem.cell, problem.policy)

    @property
    def tiles(self) -> int:
        return -(-self.batch // ROWS)

    @property
    def warps(self) -> int:
        """KT."""
        return -(-(self.hidden + self.inputs + 1) // 16)

    @property
    def width(self) -> int:
        """W."""
        return 16 * self.warps

    def parts(self) -> list[int]:
        """Elements of float32 that backward needs: what the lanes keep, [h, x, 1], and the GRU's [r * h, x, 1]."""
        rows = self.runs * self.steps * self.batch * self.width // 2
        learned, neurons = self.policy in ("skip", "selective"), self.policy in ("random_neurons", "selective")
        kept = (4 if self.cell == "gru" else 6 + learned) + neurons
        lanes = self.runs * self.steps * self.tiles * 32 * self.warps
        return [4 * kept * lanes, rows, rows if self.cell == "gru" else 0]

    def rows(self, part: Tensor) -> Tensor:
        """What the steps read, (R, T, B, W) bfloat16."""
        return part.view(torch.bfloat16).view(self.runs, self.steps, self.batch, self.width)

    def defines(self, **more: int) -> dict[str, int]:
        """The macros that the kernels are compiled with."""
        lstm, policy = int(self.cell == "lstm"), list(POLICIES).index(self.policy)
        return {"LSTM": lstm, "POLICY": policy, "I": self.inputs, "H": self.hidden, "KT": self.warps, **more}


@cache
def source() -> str:
    """The kernels'."""
    return SOURCE.read_text()


def launch(layout: Layout, name: str, defines: dict[str, int], tensors: dict[str, Tensor | None]) -> None:
    """Run one pass on contiguous tensors."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    pointers: dict[str, Any] = {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None}
    arguments = Arguments(**pointers, B=layout.batch, T=layout.steps)
    kernel = nvrtc.load(source(), layout.defines(**defines), [name])[name]
    kernel((layout.tiles, layout.runs), 32 * layout.warps, arguments)


def kept(problem: Problem, save: bool) -> list[tuple[int, ...]]:
    """What the lanes keep, and Skip's gate."""
    return kept_shapes(problem, save, sum(Layout.of(problem).parts()))


def _matrix(layout: Layout, weights: Sequence[Tensor]) -> Tensor:
    """The weights over [h, x, 1] of all gates, (R, W, G, W) in fp16."""
    of_x, of_h, bias = weights
    hidden, below = layout.hidden, layout.hidden + layout.inputs
    matrix = of_x.new_zeros(layout.runs, layout.width, layout.gates, layout.width, dtype=torch.float16)
    by_gate = layout.runs, layout.gates, hidden, -1
    matrix[:, :hidden, :, :hidden] = of_h.view(by_gate).permute(0, 3, 1, 2)
    matrix[:, hidden:below, :, :hidden] = of_x.view(by_gate).permute(0, 3, 1, 2)
    matrix[:, below, :, :hidden] = bias.view(by_gate[:3])
    return matrix


def _fragments(layout: Layout, matrix: Tensor, transposed: bool) -> Tensor:
    """The matrix, or its transpose gate by gate, as the lanes hold it: operand B of mma.m16n8k16.

    Its rows are split into 16s, and these into half, quad, pair; its columns into 16s, and these into octet and g.
    """
    runs, warps, gates = layout.runs, layout.warps, layout.gates
    if transposed:
        parts = matrix.view(runs, warps, 2, 8, gates, warps, 2, 4, 2)  # warp octet g, gate, k half quad pair
        return parts.permute(0, 1, 4, 5, 2, 3, 7, 6, 8).contiguous()
    parts = matrix.view(runs, warps, 2, 4, 2, gates, warps, 2, 8)  # k half quad pair, gate, warp octet g
    return parts.permute(0, 6, 1, 5, 7, 8, 3, 2, 4).contiguous()


def _policy_weights(layout: Layout, weights: Sequence[Tensor]) -> dict[str, Tensor | None]:
    padding = 0, layout.width - layout.hidden
    if layout.policy == "skip":
        return {"w_p": torch.nn.functional.pad(weights[0], padding), "b_p": weights[1].contiguous()}
    if layout.policy == "selective":
        rows = torch.cat([weights[0].mT, weights[1].unsqueeze(1), weights[2].unsqueeze(1)], 1)
        return {"coordinator": torch.nn.functional.pad(rows, padding), "slope": weights[3].contiguous()}
    return {}


def _split(layout: Layout, saved: Tensor) -> dict[str, Tensor]:
    return dict(zip(("kept", "read", "reset"), saved.split(layout.parts()), strict=True))


def forward(problem: Problem, save: bool) -> Outputs:
    """skiprnn::recurrence of R runs at once."""
    layout, x, entries = Layout.of(problem), problem.x, problem.entries
    outputs = Outputs.empty(problem, save)
    states = x.new_zeros(layout.runs, entries, layout.batch, layout.width)
    for entry, given in enumerate(problem.states):
        states[:, entry, :, : layout.hidden] = given
    if layout.policy == "skip":
        outputs.final_gate.copy_(torch.stack(list(problem.gate), 1))
    tensors: dict[str, Tensor | None] = {
        "x": x.contiguous(),
        "draw": contiguous(problem.draw),
        "lengths": contiguous(problem.lengths),
        "weights": _fragments(layout, _matrix(layout, problem.weights), transposed=False),
        "states": states,
        "gate": outputs.final_gate,
        "output": outputs.output,
        "updates": outputs.updates,
        "kept_gate": outputs.saved_gate,
        **_policy_weights(layout, problem.policy_weights),
        **(_split(layout, outputs.saved) if save else {}),
    }
    launch(layout, "forward", {"SAVE": int(save), "D_OUTPUT": 0}, tensors)
    return outputs._replace(final=states[..., : layout.hidden].flatten(1))


def backward(problem: Problem, outputs: Outputs, arriving: Arriving, needs_input: bool) -> Gradients:
    """skiprnn::recurrence_backward of R runs at once."""
    layout, x, entries = Layout.of(problem), problem.x, problem.entries
    hidden, below, skip = layout.hidden, layout.hidden + layout.inputs, layout.policy == "skip"
    left = 4 if layout.cell == "lstm" else 2  # gates that read [h, x, 1]
    matrix = _matrix(layout, problem.weights)
    d_states = x.new_zeros(layout.runs, entries, layout.batch, layout.width)
    if arriving.final is not None:
        d_states[..., :hidden] = arriving.final.view(layout.runs, entries, layout.batch, hidden)
    d_gate = x.new_zeros(layout.runs, 2, layout.batch) if arriving.final_gate is None else arriving.final_gate.clone()
    d_pre = x.new_empty(layout.runs, layout.steps, layout.batch, layout.blocks * layout.width, dtype=torch.bfloat16)
    d_w_p, d_b_p = x.new_empty(layout.runs, layout.tiles, layout.width), x.new_empty(layout.runs, layout.tiles)
    kept = _split(layout, outputs.saved)
    tensors: dict[str, Tensor | None] = {
        "lengths": contiguous(problem.lengths),
        "weights": _fragments(layout, matrix, transposed=True),
        "states": d_states,
        "gate": d_gate,
        "updates": outputs.updates,
        "kept": kept["kept"],
        "kept_gate": outputs.saved_gate,
        "d_output": contiguous(arriving.output),
        "d_updates": contiguous(arriving.updates),
        "d_pre": d_pre,
        "d_w_p": d_w_p,
        "d_b_p": d_b_p,
        **_policy_weights(layout, problem.policy_weights),
    }
    launch(layout, "backward", {"SAVE": 1, "D_OUTPUT": int(arriving.output is not None)}, tensors)
    sizes = [left * layout.width, (layout.gates - left) * layout.width, (layout.blocks - layout.gates) * layout.width]
    reads = [kept["read"], kept["reset"], kept["read"]]
    products = [
        summed_product(layout.rows(read), part)
        for read, part in zip(reads, d_pre.split(sizes, 3), strict=True)
        if part.numel()
    ]
    shape = layout.runs, layout.width, layout.blocks, layout.width
    d_matrix = torch.cat(products, 2).view(shape)[..., :hidden].permute(0, 2, 3, 1)  # (R, blocks, H, W)
    d_blocks = d_matrix[:, : layout.gates]
    d_weights = [d_blocks[..., hidden:below], d_blocks[..., :hidden], d_blocks[..., below]]
    found = [d_states[:, entry, :, :hidden] for entry in range(entries)]
    found += [part.flatten(1, 2) for part in d_weights]
    if skip:
        found += [*d_gate.unbind(1), d_w_p.sum(1)[:, :hidden], d_b_p.sum(1)]
    if layout.policy == "selective":
        of_read = d_matrix[:, -1]
        found += [of_read[..., hidden:below], of_read[..., :hidden].diagonal(dim1=1, dim2=2), of_read[..., below]]
        found += [torch.zeros_like(problem.policy_weights[3])]
    d_x = x.new_empty(0)
    if needs_input:
        of_x = matrix[:, hidden:below].flatten(2).to(torch.bfloat16)
        if layout.policy == "selective":
            padded = torch.nn.functional.pad(problem.policy_weights[0].mT, (0, layout.width - hidden))
            of_x = torch.cat([of_x, padded.to(torch.bfloat16)], 2)
        d_x = of_input(d_pre, of_x.mT)
    return Gradients.of([d_x, *found], problem)


KERNELS["cuda"] = Kernels(kept, forward, backward)

"""Compile what the GPU engine would launch, without a GPU, and say what it takes: registers, spills, shared memory.

    python tests/compile_triton.py 90 lstm-skip-2-110-train gru-always-1-250-infer

Arguments: the GPU's architecture (80, 90, 100), then variants, cell-policy-layers-units-task. Prints a line of JSON per
kernel. The engine runs as it always does, in the CPU's memory, but for the launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from conftest import triton_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from skiprnn import Recurrent
from skiprnn.model.engines import triton as engine

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Ahead:
    """A driver of a GPU that is not there."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, and how many instructions of loops read or write what was spilled there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([TOOLS / tool, flag, file], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    labels, spills, loops = {}, [], []
    for line, text in enumerate(code.splitlines()):
        if label := re.match(r"\s*(\.L_x_\d+):", text):
            labels[label[1]] = line
        elif re.search(r"\b(LDL|STL)\b", text):
            spills.append(line)
        elif (jump := re.search(r"\bBRA\b.*(\.L_x_\d+)", text)) and jump[1] in labels:
            loops.append((labels[jump[1]], line))
    in_loops = sum(any(first <= line <= last for first, last in loops) for line in spills)
    return {"registers": int(found[1]), "stack": int(found[2]), "spills": in_loops, "loops": len(loops)}


def run_engine(cell: str, policy: str, layers: int, hidden: int, train: bool) -> None:
    """A step of training, or of inference."""
    options = {"p_skip": 0.5} if policy.startswith("random") else {}
    rnn = Recurrent(cell, policy, 1, hidden, layers, engine="triton", batch_first=True, **options)
    with torch.set_grad_enabled(train):
        output, state, updates = rnn(torch.zeros(32, 16, 1))
        h = state if isinstance(state, torch.Tensor) else state[0]
        if train:
            loss = output.sum() + h.sum()
            (loss + updates.sum() if updates.requires_grad else loss).backward()


def main(architecture: str, *variants: str) -> None:
    driver.set_active(Ahead(int(architecture)))
    run, launched = jit.JITFunction.run, []

    def compiled(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.__name__, kernel))
        return kernel

    jit.JITFunction.run = compiled
    engine.interpreted = lambda: True  # that is, the CPU will do
    with triton_kernels():
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        for variant in variants:
            cell, policy, layers, hidden, task = variant.split("-")
            launched.clear()
            run_engine(cell, policy, int(layers), int(hidden), task == "train")
            for name, kernel in launched:
                found = resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
                print(json.dumps({"variant": variant, "architecture": int(architecture), "pass": name} | found))


if __name__ == "__main__":
    main(*sys.argv[1:])

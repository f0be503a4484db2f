"""What the CUDA engine's kernels take of GPUs that are not here: registers and stack, by -s; none spills much."""

import ctypes
import importlib.util
from itertools import product

import cuda_on_cpu
import pytest
import torch

from skiprnn import Recurrent
from skiprnn.model import engines
from skiprnn.model.engines.cuda import nvrtc, operator

REGISTERS = 255  # that a thread can have
STACK = 64  # bytes of a thread that may be spilled
SPILL = {(80, 110): 96, (80, 126): 112, (90, 126): 72}  # Skip LSTM's backward, with a loss on the output

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA has no NVRTC"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="cuobjdump is Triton's"),
]


def known() -> list[int]:
    """The architectures of this NVRTC."""
    count = ctypes.c_int()
    nvrtc._compile(nvrtc._compiler().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    nvrtc._compile(nvrtc._compiler().nvrtcGetSupportedArchs(found))
    return list(found)


def launched(cell: str, policy: str, hidden: int, monkeypatch) -> dict[tuple[tuple[str, int], ...], set[str]]:
    """The macros that the engine compiles with, each with the kernels that it launches of these: inferring, and
    training with a loss on the last state and with one on the output."""
    found: dict[tuple[tuple[str, int], ...], set[str]] = {}

    def load(source, defines, names):
        found.setdefault(tuple(sorted(defines.items())), set()).update(names)
        return {name: lambda grid, threads, arguments: None for name in names}

    rnn = Recurrent(cell, policy, 1, hidden, batch_first=True, p_skip=0.5 if policy.startswith("random") else None)
    x = torch.rand(2, 3, 1)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "load", load)
        with torch.no_grad():
            engines.run_packed("cuda", [rnn.prepare(x)])
        for loss in (lambda result: result.states[-1][0].sum(), lambda result: result.output.sum()):
            (result,) = engines.run_packed("cuda", [rnn.prepare(x)])
            loss(result).backward()
    return found


def check(architecture: int, cell: str, policy: str, hidden: int, folder, monkeypatch) -> None:
    """Raises AssertionError if a kernel takes more than a GPU has, or spills."""
    if architecture not in known():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    variants = launched(cell, policy, hidden, monkeypatch)
    assert sorted(name for names in variants.values() for name in names) == ["backward"] * 2 + ["forward"] * 2
    for defines, names in variants.items():
        code = nvrtc.cubin(operator.source(), dict(defines), f"sm_{architecture}")
        taken = cuda_on_cpu.resources(code, folder)
        for name in sorted(names):
            print(f"sm_{architecture} {cell} {policy} H={hidden} {name} {dict(defines)}: {taken[name]}")
            assert 32 < taken[name].registers <= REGISTERS
            assert taken[name].stack <= STACK


@pytest.mark.parametrize("policy", operator.POLICIES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_kernels_keep_to_their_registers(cell, policy, tmp_path, monkeypatch):
    """For an H100, 110 units; other GPUs, and all columns in use: the slow test."""
    check(90, cell, policy, 110, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "policy"), list(product(["lstm", "gru"], operator.POLICIES)))
@pytest.mark.parametrize("hidden", [110, 126])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_kernels_keep_to_their_registers(architecture, hidden, cell, policy, tmp_path, monkeypatch, request):
    if (cell, policy) == ("lstm", "skip") and (spilled := SPILL.get((architecture, hidden))):
        request.applymarker(pytest.mark.xfail(reason=f"it spills {spilled} bytes", strict=True, raises=AssertionError))
    check(architecture, cell, policy, hidden, tmp_path, monkeypatch)

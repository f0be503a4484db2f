"""Runs the kernels of a .cu file on the CPU, thread by thread, by cuda_on_cpu.h: slow and deterministic.

And says what they take of a GPU once compiled for it.
"""

import ctypes
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from skiprnn.model.engines.native import build as native

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
KERNEL = re.compile(r'extern\s+"C"\s+__global__[^{;]*?(\w+)\s*\([\w\s]+\)\s*\{')  # of one struct, by value
LAUNCH = """
extern "C" const char* launch_{0}(unsigned x, unsigned y, unsigned n, const void* a, size_t size, unsigned order) {{
  return cuda_on_cpu::launch({0}, x, y, n, a, size, order);
}}
"""


class Library:
    """The kernels of a .cu file."""

    def __init__(self, file: Path):
        self.functions = ctypes.CDLL(str(file))

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, arguments: ctypes.Structure, order: int = 0
    ) -> None:
        """Run a kernel to its end; pointers in its arguments are to the CPU's memory.

        One warp after another goes as far as it gets without the others, in order, or shuffled by a seed `order` > 0,
        its lanes too: a kernel without races computes the same in every order.

        Raises:
            RuntimeError: some threads wait for others in vain, call different primitives of the warp, or misuse one.
        """
        function = getattr(self.functions, f"launch_{name}")
        function.restype = ctypes.c_char_p
        size = ctypes.c_size_t(ctypes.sizeof(arguments))
        if failed := function(*grid, threads, ctypes.byref(arguments), size, order):
            raise RuntimeError(f"{name}: {failed.decode()}")


def build(source: Path, defines: Mapping[str, int], folder: Path) -> Library:
    """Compile a .cu file with these macros into the folder.

    Raises:
        RuntimeError: no C++ compiler, or it failed.
    """
    kernels = KERNEL.findall(source.read_text())
    stem = "-".join([source.stem, *(f"{name}{value}" for name, value in defines.items())])
    file, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
    file.write_text(f'#include "{source.resolve()}"\n' + "".join(map(LAUNCH.format, kernels)))
    macros = ["-DCUDA_ON_CPU", *(f"-D{name}={value}" for name, value in defines.items())]
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-include", HEADER]
    command = [*native.find_compiler(), *flags, *macros, file, "-o", library]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        raise RuntimeError(compiled.stderr)
    return Library(library)


class Resources(NamedTuple):
    """What a kernel takes."""

    registers: int  # per thread
    stack: int  # bytes per thread: of what was spilled, and of arrays that are not in registers
    shared: int  # bytes per block, with the 1024 that the system takes from sm_90 on


def resources(cubin: bytes, folder: Path) -> dict[str, Resources]:
    """What each kernel takes, as the tools that come with Triton tell."""
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    command = [Path(triton) / "backends" / "nvidia" / "bin" / "cuobjdump", "-res-usage", file]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", told)
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}

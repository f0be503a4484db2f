"""Compiles the native engine on first use, for the vectors this processor has, and keeps it in the user's cache.

SKIPRNN_CACHE names the cache folder (~/.cache/skiprnn), CXX the compiler; `python -m skiprnn.model.engines.native`
builds it ahead of its first use.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
# no -ffast-math: it breaks the range reduction of exp
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread"]
# libraries of several variants in one process must not share functions
FLAGS += ["-fvisibility=hidden"]
VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it does not compile the engine."""


def find_compiler() -> str:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++.

    Raises:
        NoCompilerError: none is there.
    """
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NoCompilerError("no C++ compiler found (set CXX, or install g++ or clang++)")


def compile_library(source: Path, flags: list[str]) -> Path:
    """The shared library of one source with these flags, compiled unless the cache has it.

    Raises:
        NoCompilerError: no compiler, or it failed.
    """
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, platform.machine(), platform.system(), source.name, *flags]
    key = hashlib.sha256("\0".join(parts).encode() + b"".join(file.read_bytes() for file in SOURCES)).hexdigest()[:16]
    cache = Path(os.environ.get("SKIPRNN_CACHE") or Path.home() / ".cache" / "skiprnn")
    library = cache / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unfinished = Path(folder) / library.name
        run = subprocess.run([compiler, *flags, str(source), "-o", str(unfinished)], capture_output=True, text=True)
        if run.returncode:
            raise NoCompilerError(f"{compiler} does not compile {source.name}:\n{run.stderr[-2000:]}")
        unfinished.replace(library)  # atomic: processes that start together may all compile, and none reads a half
    return library


@functools.cache
def best_variant() -> str:
    """The widest vectors of this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    probe = ctypes.CDLL(str(compile_library(FOLDER / "probe.cpp", FLAGS)))
    return list(VARIANTS)[probe.skiprnn_variant()]


@functools.cache
def load(variant: str | None = None) -> ctypes.CDLL:
    """The engine's library, by default for the widest vectors of this processor.

    Raises:
        NoCompilerError: it can't be compiled.
    """
    flags = FLAGS + VARIANTS[variant or best_variant()]
    return ctypes.CDLL(str(compile_library(FOLDER / "recurrence.cpp", flags)))


@functools.cache
def available() -> bool:
    """Whether the engine can be used; warns once if not."""
    try:
        load()
    except (NoCompilerError, OSError) as error:
        warnings.warn(
            f"skiprnn's native engine is not available, plain torch runs instead: the same results, many times "
            f"slower, and only inference and random skipping gain from skipped steps. {error}",
            stacklevel=2,
        )
        return False
    return True

"""Compiles the native engine on first use, for the vectors this processor has, and keeps it in the user's cache.

SKIPRNN_CACHE names the cache folder (~/.cache/skiprnn), CXX the compiler; `python -m skiprnn.model.engines.native`
builds it ahead of its first use.

A library's name is SOURCE-INPUT-COMPILER-CONTENT.so: digests of what it is made from, of the compiler's version, and of
the file itself, which is checked before it is loaded: a damaged one would end the process without a word.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
UNFINISHED = "unfinished-"  # begins the names of what a compilation makes on the way


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it does not compile the engine."""


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, which may have arguments, else the first of c++, g++ and clang++.

    Raises:
        NoCompilerError: none is there.
    """
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise NoCompilerError("no C++ compiler found (set CXX, or install g++ or clang++)")


def compile_library(source: Path, flags: list[str]) -> Path:
    """The shared library of one source with these flags, compiled unless the cache has it.

    Without a compiler, one that another compiler made serves as well.

    Raises:
        NoCompilerError: no compiler, or it failed.
        OSError: the cache folder can't be written.
    """
    described = "\0".join([platform.machine(), platform.system(), *flags]).encode()
    made_from = f"{source.stem}-{_digest(described + b''.join(file.read_bytes() for file in SOURCES))}"
    cache = Path(os.environ.get("SKIPRNN_CACHE") or Path.home() / ".cache" / "skiprnn")
    try:
        compiler = find_compiler()
    except NoCompilerError:
        if library := _sound(cache, f"{made_from}-*"):
            return library
        raise
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    stem = f"{made_from}-{_digest(version)}"
    if library := _sound(cache, f"{stem}-*"):
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache):
        if library := _sound(cache, f"{stem}-*"):  # another process was faster
            return library
        for damaged in cache.glob(f"{stem}-*.so"):
            damaged.unlink()
        for left in cache.glob(f"{UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if source.stem == "recurrence":
            print(f"skiprnn: compiling its C++ engine, once, about 20 seconds; it is kept in {cache}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache, prefix=UNFINISHED) as folder:
            return _compile(compiler, source, flags, Path(folder) / "library.so", cache / stem)


def _compile(compiler: list[str], source: Path, flags: list[str], unfinished: Path, stem: Path) -> Path:
    """Compile into a file on the way, and move it, complete and on the disk, to its name."""
    run = subprocess.run([*compiler, *flags, str(source), "-o", str(unfinished)], capture_output=True, check=False)
    if run.returncode or not unfinished.exists():
        told = run.stderr.decode(errors="replace").splitlines()
        reason = next((line for line in told if "error" in line), f"it ended with status {run.returncode}")
        raise NoCompilerError(f"{shlex.join(compiler)} does not compile {source.name}: {reason}")
    with unfinished.open("rb+") as file:
        content = file.read()
        os.fsync(file.fileno())
    library = stem.with_name(f"{stem.name}-{_digest(content)}.so")
    unfinished.replace(library)
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sound(cache: Path, pattern: str) -> Path | None:
    """A library of the cache that is what its name says; None if there is none."""
    for library in sorted(cache.glob(f"{pattern}.so")):
        if library.stem.endswith(_digest(library.read_bytes())):
            return library
    return None


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Within, no other process compiles; one that dies lets go."""
    with (cache / "lock").open("w") as file:
        with suppress(ImportError, OSError):  # where there are no locks, two may compile the same: one result stays
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def available() -> bool:
    """Whether the engine can be used; warns once if not."""
    return _available()


# torch.compile takes it as it is; torch.compiler.assume_constant_result says so too, and first imports the compiler
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _available() -> bool:
    try:
        load()
    except (NoCompilerError, OSError) as error:
        warnings.warn(
            f"skiprnn's native engine is not available, plain torch runs instead: the same results, many times "
            f"slower, and only inference and random skipping gain from skipped steps. {error}",
            stacklevel=3,
        )
        return False
    return True

"""The compiled library and its cache, with a compiler that takes the library from where it was compiled before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skiprnn.model.engines.native import build

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")

COMPILER = """#!/bin/bash
[ "$1" = --version ] && { printf "$VERSION"; exit; }
echo "$@" >> "$CALLS"
for last; do :; done  # the file after -o
case "$*" in *probe.cpp*) from="$PROBE";; *) from="$LIBRARY";; esac
cp "$from" "$last"
"""
KILLED = """#!/bin/bash
[ "$1" = --version ] && exit
for last; do :; done
head -c 5000 "$LIBRARY" > "$last"
kill -9 $PPID
"""
USE = """
import runpy, sys
build = runpy.run_path(sys.argv[1])  # without the package: quickly
assert build["available"]()
"""


@pytest.fixture
def machine(tmp_path):
    """A machine with an empty cache: a function that runs USE there, and its paths."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder: Path):
        self.folder, self.cache = folder, folder / "cache"
        self.environment = os.environ | {
            "CXX": self.script("compiler", COMPILER),
            "SKIPRNN_CACHE": str(self.cache),
            "VERSION": "fake 1.0",
            "CALLS": str(folder / "calls"),
            "LIBRARY": build.load()._name,
            "PROBE": str(build.compile_library(build.FOLDER / "probe.cpp", build.FLAGS)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def script(self, name: str, text: str) -> str:
        file = self.folder / name
        file.write_text(text)
        file.chmod(0o755)
        return str(file)

    def start(self, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", USE, build.__file__], env=self.environment | environment, stderr=subprocess.PIPE
        )

    def run(self, **environment: str) -> str:
        """What USE says on stderr, which must succeed."""
        process = self.start(**environment)
        said = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, said
        return said

    @property
    def compiled(self) -> list[str]:
        """The sources compiled so far."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [Path(next(word for word in line.split() if word.endswith(".cpp"))).stem for line in lines]

    def library(self) -> Path:
        (library,) = self.cache.glob("recurrence-*.so")
        return library

    def holds_libraries_alone(self) -> bool:
        kinds = sorted(file.name.partition("-")[0] for file in self.cache.iterdir())
        return kinds == ["lock", "probe", "recurrence"]


def test_a_first_compilation_says_so_and_the_second_use_takes_it(machine):
    said = machine.run()
    assert said.count("skiprnn: compiling its C++ engine, once, about 20 seconds") == 1
    assert "compiling" not in machine.run()
    assert machine.compiled == ["probe", "recurrence"]
    assert machine.holds_libraries_alone()


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "renamed"])
def test_a_damaged_library_is_compiled_anew(machine, damage):
    """Loading a truncated one would end Python without a word."""
    machine.run()
    file = machine.library()
    content = file.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes(64) + content[middle + 64 :]
    if damage == "renamed":  # as if what is compiled now were another file
        file.rename(file.with_name(f"{file.stem[:-16]}{16 * '0'}.so"))
    else:
        file.write_bytes({"truncated": content[:middle], "empty": b"", "changed": changed}[damage])
    machine.run()
    assert machine.compiled == ["probe", "recurrence", "recurrence"]
    assert machine.library().read_bytes() == content
    assert machine.holds_libraries_alone()


def test_processes_that_start_together_compile_once(machine):
    processes = [machine.start() for _ in range(3)]
    said = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert machine.compiled == ["probe", "recurrence"]
    assert machine.holds_libraries_alone()


def test_a_killed_compilation_leaves_nothing_that_lasts(machine):
    process = machine.start(CXX=machine.script("killed", KILLED))
    process.communicate(timeout=300)
    assert process.returncode == -9
    assert not machine.holds_libraries_alone()
    machine.run()
    assert machine.holds_libraries_alone()


def test_a_compiler_that_fails_is_named_with_its_reason(machine, monkeypatch):
    failing = machine.script("failing", "#!/bin/bash\necho 'x.cpp:1: error: no such thing' >&2\nexit 3\n")
    monkeypatch.setenv("CXX", failing)
    monkeypatch.setenv("SKIPRNN_CACHE", str(machine.cache))
    with pytest.raises(
        build.NoCompilerError, match=r"failing does not compile probe.cpp: x.cpp:1: error: no such thing$"
    ):
        build.compile_library(build.FOLDER / "probe.cpp", build.FLAGS)
    monkeypatch.setenv("CXX", machine.script("silent", "#!/bin/bash\nexit 3\n"))
    with pytest.raises(build.NoCompilerError, match="it ended with status 3"):
        build.compile_library(build.FOLDER / "probe.cpp", build.FLAGS)


def test_the_compiler_may_be_a_command_with_arguments(machine):
    machine.script("ccache", '#!/bin/bash\nexec "$@"\n')
    path = f"{machine.folder}{os.pathsep}{os.environ['PATH']}"
    machine.run(CXX=f"ccache {machine.environment['CXX']}", PATH=path)
    assert machine.compiled == ["probe", "recurrence"]


def test_a_cached_library_needs_no_compiler(machine):
    machine.run()
    assert "compiling" not in machine.run(CXX="no-such-compiler")


def test_another_compiler_compiles_anew(machine):
    machine.run()
    machine.run(VERSION="fake 2.0")
    assert machine.compiled == ["probe", "recurrence"] * 2


def test_a_version_need_not_be_utf8(machine):
    machine.run(VERSION=r"g\xffcc")
    assert machine.holds_libraries_alone()

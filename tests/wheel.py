"""The wheel as a user has it, in two fresh environments outside the checkout: make test-wheel

core           torch alone: forward, backward, stream; the C++ engine, and what is said where it cannot be built
experiments    with that extra, from an empty folder: a sweep in several processes, its table, the dashboard

Nothing is downloaded. Each environment gets links to the installed distributions that the metadata of its requirement
ask for, and to no others; then pip, without an index, finds all that the wheel requires, or fails.
"""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, PathDistribution, distributions
from pathlib import Path, PurePath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# nothing of this process's environment leads back to the checkout or to an index
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "SKIPRNN_"))}
ENVIRONMENT |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
CORE = """
import torch
from skiprnn import SkipLSTM

torch.manual_seed(0)
rnn, x = SkipLSTM(3, 5, batch_first=True), torch.randn(2, 7, 3)
output, state, updates = rnn(x)
(output.square().mean() + updates.mean()).backward()
assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
stream = rnn.stream()
steps = torch.stack([stream.push(sample).output for sample in x[0]])
assert torch.allclose(steps, output[0], atol=1e-5)
print(rnn.engine_for(x), f"{output.sum():.4f}")
"""


@cache
def installed() -> dict[str, Distribution]:
    """All distributions of this environment, by canonical name."""
    return {canonicalize_name(one.name): one for one in distributions()}


@cache
def owners() -> dict[PurePath, set[str]]:
    """Of every installed file and folder: the distributions that have files there."""
    found = defaultdict(set)
    for name, one in installed().items():
        for file in one.files or ():
            for place in (file, *file.parents):
                found[place].add(name)
    return found


def needed(distribution: Distribution, extras: Iterable[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """The distributions that one requires on this machine with these extras, by their metadata; not itself."""
    for part in map(Requirement, distribution.requires or ()):
        one = canonicalize_name(part.name), frozenset(part.extras)
        wanted = not part.marker or any(part.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if wanted and one not in seen:
            seen.add(one)
            needed(installed()[one[0]], part.extras, seen)
    return {name for name, _ in seen}


def link(names: set[str], site: Path) -> None:
    """Link the files of these distributions into a site-packages folder: a whole folder where it is theirs alone."""
    for name in names:
        for file in installed()[name].files or ():
            whole = next(place for place in (*reversed(file.parents), file) if owners()[place] <= names)
            target = site / whole
            if ".." not in whole.parts and not target.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(installed()[name].locate_file(whole))


def run(*command: str | Path, folder: Path, fails: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a folder and see that it ends as it should."""
    print("$", *(part if part is not CORE else "..." for part in command), flush=True)
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def build(folder: Path) -> Path:
    """The wheel, made from the source distribution: both hold all that they should."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, *folder.glob("*.tar.gz"), folder=folder)
    (wheel,) = folder.glob("*.whl")
    tracked = run("git", "ls-files", "skiprnn", "hydra_plugins", "conf", "experiments", folder=ROOT).stdout.split()
    wanted = {f"skiprnn/{file}" if file.startswith(("conf/", "experiments/")) else file for file in tracked}
    held = {file for file in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in file}
    assert wanted == held, f"not in the wheel, or too much there: {sorted(wanted ^ held)}"
    return wheel


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """A fresh environment with the wheel and what it requires; returns its folder of programs."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    (site,) = folder.glob("lib/python*/site-packages")
    (metadata,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    link(needed(PathDistribution(metadata), [extra], set()), site)
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    run(*pip, "install", "--quiet", f"{wheel}[{extra}]" if extra else wheel, folder=folder)
    run(*pip, "check", folder=folder)
    return programs


def check_core(programs: Path, folder: Path) -> None:
    built, unbuilt = (str(programs.with_name(name)) for name in ("built", "unbuilt"))
    fast = run(programs / "python", "-c", CORE, folder=folder, SKIPRNN_CACHE=built)
    plain = run(programs / "python", "-c", CORE, folder=folder, SKIPRNN_CACHE=unbuilt, CXX="none")
    (engine, output), (fallback, same) = fast.stdout.split(), plain.stdout.split()
    assert (engine, fallback, output) == ("native", "reference", same)
    assert plain.stderr.count("no C++ compiler") == 1
    assert "\n  train " in run(programs / "skiprnn", folder=folder).stdout
    said = run(programs / "skiprnn", "train", folder=folder, fails=True).stderr.splitlines()
    assert "skiprnn" not in "".join(said[:-1]), "more than torch's own remark that there is no NumPy"
    assert said[-1] == "error: skiprnn train needs hydra: pip install 'skiprnn[experiments]'"
    assert not list(folder.iterdir())


def check_experiments(programs: Path, folder: Path) -> None:
    skiprnn = programs / "skiprnn"
    small = ["profile=digits/smoke", "training.epochs=1", "model.hidden_size=4", "device=cpu", "threads=1"]
    table = ["experiment=digits", "rows=[1,4]", *small]
    processes = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
    assert "| 1 / 1 " in run(skiprnn, "train", "-m", *table, *processes, folder=folder).stdout
    assert "| 1 / 1 " in run(skiprnn, "tables", *table, folder=folder).stdout
    run(skiprnn, "dashboard", folder=folder)
    assert (folder / "outputs" / "tables" / "digits_smoke" / "table.tex").is_file()
    assert "Skip LSTM" in (folder / "outputs" / "dashboard.html").read_text()
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    for arguments, extra in {
        ("train", "-m", "hydra/launcher=slurm", *small): "slurm",
        ("train", "logger=[csv,wandb]", *small): "wandb",
        ("train", "data=nowhere"): "",
    }.items():
        said = run(skiprnn, *arguments, folder=folder, fails=True).stderr
        assert said.endswith(f"pip install 'skiprnn[{extra}]'\n") if extra else "Could not find 'data/nowhere'" in said
        assert "Traceback" not in said


def main() -> None:
    """Build, install, try; the first thing that is wrong ends it."""
    with tempfile.TemporaryDirectory() as temporary:
        places = {name: Path(temporary, name) for name in ("dist", "core", "nothing", "extra", "empty")}
        for name in ("dist", "nothing", "empty"):
            places[name].mkdir()
        wheel = build(places["dist"])
        check_core(environment(places["core"], wheel), places["nothing"])
        check_experiments(environment(places["extra"], wheel, "experiments"), places["empty"])
    print("the wheel is whole, and works with torch alone and with its experiments")


if __name__ == "__main__":
    main()

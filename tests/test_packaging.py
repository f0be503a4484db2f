"""What is declared is what is imported, the lock holds all of it, and each command is found."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from conftest import command, compose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from skiprnn import SkipLSTM
from skiprnn import __main__ as console
from skiprnn.data.base import DataError
from skiprnn.data.imdb import IMDb
from skiprnn.data.ucf101.extract import extract
from skiprnn.papers import plan
from skiprnn.training import command_line, wandb_page

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
MODULES = [file.relative_to(ROOT) for name in ("skiprnn", "hydra_plugins") for file in ROOT.glob(f"{name}/**/*.py")]
USED_UNSEEN = {"tabulate", "tensorboard"}  # by libraries
CORE = {"torch", "triton"}  # the second is torch's own, where there is a GPU


def own(requirements: list[str]) -> dict[str, Requirement]:
    """By canonical name, without those of another extra."""
    parsed = {canonicalize_name(one.name): one for one in map(Requirement, requirements)}
    return {name: one for name, one in parsed.items() if name != "skiprnn"}


DIRECT = (
    PROJECT["build-system"]["requires"]
    + PROJECT["project"]["dependencies"]
    + [one for extra in EXTRAS.values() for one in extra]
)
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PINS = {name: one for name, one in own(LINES).items() if not one.marker or one.marker.evaluate()}  # on this machine
LOCK = {name: str(one.specifier).removeprefix("==") for name, one in PINS.items()}


def test_the_lock_satisfies_what_is_required():
    assert all(str(one.specifier).startswith("==") and not one.url for one in map(Requirement, LINES))
    wrong = [str(one) for name, one in own(DIRECT).items() if name not in LOCK or LOCK[name] not in one.specifier]
    assert not wrong


def installed(name: str) -> str | None:
    """Its version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def test_the_lock_holds_all_that_is_required_and_nothing_else():
    """By the metadata of what is installed, which is the lock's."""
    if other := [name for name in LOCK if installed(name) != LOCK[name]]:
        pytest.skip(f"this environment is not the lock's: {', '.join(other)}; make install")
    reached: set[tuple[str, frozenset[str]]] = set()

    def follow(texts: list[str], extras: frozenset[str]) -> None:
        for one in map(Requirement, texts):
            here = canonicalize_name(one.name), frozenset(one.extras)
            active = not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if active and here not in reached:
                assert LOCK.get(here[0], "none") in one.specifier, f"{one} is asked for; locked: {LOCK.get(here[0])}"
                reached.add(here)
                follow(requires(here[0]) or [], here[1])

    follow([text for text in DIRECT if not text.startswith("skiprnn")], frozenset())
    assert {name for name, _ in reached} == set(LOCK)


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, and whether it is at once, when the file itself is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module or "", node in tree.body


def distribution(module: str, known: dict[str, list[str]]) -> str | None:
    """The distribution that a module is of; None for Python's own and ours."""
    root, *rest = module.split(".")
    if root == "hydra_plugins":  # many distributions have a part of it, and each is called like its own
        root = rest[0]
    if root in sys.stdlib_module_names or root.startswith("skiprnn"):
        return None
    return canonicalize_name(next(iter(known.get(root, [root]))))


def test_every_import_is_declared_where_it_is_needed():
    """The model imports torch alone; the rest what `experiments` brings; a file that uses another extra names it."""
    known = packages_distributions()
    extra_of = {name: extra for extra in reversed(EXTRAS) if extra != "dev" for name in own(EXTRAS[extra])}
    assert set(own(PROJECT["project"]["dependencies"])) == CORE - {"triton"}
    used = set()
    for file in MODULES:
        text = (ROOT / file).read_text()
        model = file.parts[:2] in (("skiprnn", "model"), ("skiprnn", "__init__.py"), ("skiprnn", "__main__.py"))
        for module, at_once in imports(ast.parse(text)):
            name = distribution(module, known)
            if name is None or name in CORE:
                continue
            used.add(name)
            assert name in extra_of, f"{file} imports {module}: no requirement in pyproject.toml brings it"
            if model or extra_of[name] != "experiments":
                assert not at_once, f"{file} imports {module} at once"
                assert f"skiprnn[{extra_of[name]}]" in text, f"{file} imports {module} and does not say of which extra"
    assert set(extra_of) - used == USED_UNSEEN - used, "declared, and imported nowhere"


def test_the_model_needs_no_other_part_of_the_package():
    for file in (file for file in MODULES if file.parts[1] in ("model", "__init__.py")):
        ours = [module for module, _ in imports(ast.parse((ROOT / file).read_text())) if module.startswith("skiprnn")]
        assert [module for module in ours if module.split(".")[1:2] not in ([], ["model"])] == [], file


def beside(name: str) -> set[str]:
    """The top-level modules of all installed distributions but one, and but those that it requires on this machine."""
    own: set[str] = set()
    new = {canonicalize_name(name)}
    while new:
        own |= new
        required = [one for known in new if installed(known) for one in map(Requirement, requires(known) or [])]
        active = [one for one in required if not one.marker or one.marker.evaluate({"extra": ""})]
        new = {canonicalize_name(one.name) for one in active} - own
    owners = packages_distributions().items()
    return {module for module, names in owners if not own & {canonicalize_name(one) for one in names}} - {"skiprnn"}


ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Few(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv else super().find_spec(name, path, target)

sys.meta_path[:] = BuiltinImporter, FrozenImporter, Few

import torch
import skiprnn

for name in ("LSTM", "GRU", "RandomSkipLSTM", "RandomSkipGRU", "SkipLSTM", "SkipGRU", "SALSTM", "SAGRU"):
    for engine in ("auto", "reference"):
        torch.manual_seed(0)
        rnn, x = getattr(skiprnn, name)(3, 5, batch_first=True, engine=engine), torch.randn(2, 7, 3)
        output, state, updates = rnn(x)
        (output.square().mean() + updates.mean()).backward()
        before = [parameter.detach().clone() for parameter in rnn.parameters()]
        torch.optim.SGD(rnn.parameters(), 0.1).step()
        assert not any(torch.equal(*pair) for pair in zip(before, rnn.parameters())), name
        with torch.no_grad():
            output, *_ = rnn(x[:1])
        if name in ("LSTM", "GRU", "SkipLSTM", "SkipGRU"):
            stream = rnn.stream()
            steps = torch.stack([stream.push(sample).output for sample in x[0]])
            assert torch.allclose(steps, output[0], atol=1e-5), name
try:
    skiprnn.SkipLSTM.from_pretrained("some.safetensors")
except ValueError as error:
    print(error)
"""


def test_the_model_runs_where_there_is_torch_alone():
    """Forward, backward, a training step, a stream; a checkpoint says what it needs."""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    program = [sys.executable, "-c", ALONE, *beside("torch")]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checkpoints need safetensors: pip install 'skiprnn[experiments]'\n"


def test_every_command_is_listed(capsys, monkeypatch):
    """A command is a file beside __main__.py that can be run."""
    files = (ROOT / "skiprnn").glob("[a-z]*.py")
    assert {file.stem for file in files if '__name__ == "__main__"' in file.read_text()} == set(console.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["skiprnn"])
    console.main()
    listed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in listed] == list(console.COMMANDS)


def test_an_unknown_command_is_told_the_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["skiprnn", "trian", "-m"])
    with pytest.raises(SystemExit, match=r"^error: no command trian; there are train, sweep, status"):
        console.main()


def test_a_command_gets_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["skiprnn", "tables", "experiment=nowhere"])
    with pytest.raises(SystemExit, match=r"^error: experiment=nowhere: there are"):
        console.main()
    monkeypatch.setattr(sys, "argv", ["skiprnn", "bench", "--help"])
    with pytest.raises(SystemExit):
        console.main()
    assert capsys.readouterr().out.startswith("usage: skiprnn bench [-h] [--quick]")


COMPLETED = """
eval "$(skiprnn -sc install=bash)"
complete -p skiprnn
for COMP_LINE in "skiprnn t" "skiprnn train -m --detach model=sk"; do
    typed=($COMP_LINE)
    COMP_CWORD=$((${#typed[@]} - 1))
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_commands_and_settings(tmp_path):
    """As docs/sweeps.md installs it, with the console command as pip writes it."""
    (tmp_path / "skiprnn").write_text(f"#!{sys.executable}\nfrom skiprnn.__main__ import main\nmain()\n")
    (tmp_path / "skiprnn").chmod(0o755)
    there = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", COMPLETED], env=there, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    registered, names, settings = done.stdout.splitlines()
    assert registered.split()[-2:] == ["hydra_bash_completion", "skiprnn"]
    assert (names, settings) == ("train tables", "model=skip_gru model=skip_lstm")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("skiprnn ", list(console.COMMANDS)),
        ("skiprnn tables experiment=digits model=sk", ["model=skip_gru", "model=skip_lstm"]),
        ("skiprnn train model.cost", ["model.cost_per_sample="]),
        ("skiprnn train mod", ["model.", "model="]),
        ("skiprnn train model=nothing data=dig", ["data=digits"]),
        ("skiprnn evaluate mod", []),
    ],
)
def test_what_completes_a_line(line, expected, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr(sys, "argv", ["skiprnn", "-sc", "query=bash"])
    console.main()
    assert capsys.readouterr().out.split() == expected


def test_a_command_without_its_extra_says_which(monkeypatch):
    for module in ("skiprnn.dashboard", "skiprnn.views.page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("skiprnn.views.page", raising=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.setattr(sys, "argv", ["skiprnn", "dashboard"])
    expected = r"^error: skiprnn dashboard needs vl_convert: pip install 'skiprnn\[experiments\]'$"
    with pytest.raises(SystemExit, match=expected):
        console.main()


@pytest.mark.parametrize(
    ("library", "extra", "use"),
    [
        ("safetensors", "experiments", lambda: SkipLSTM.from_pretrained("model.safetensors")),
        ("gensim", "text", lambda: IMDb(vectors="vectors.bin").embeddings()),
        ("av", "video", lambda: extract(Path("videos"), Path("store"))),
        ("wandb", "wandb", lambda: wandb_page.page_options(command_line.read(compose(["logger=[csv,wandb]"])))),
    ],
)
def test_what_needs_an_extra_says_which(library, extra, use, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:  # of a test before
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises((ValueError, DataError), match=rf"^[^\n]* needs? {library}: pip install 'skiprnn\[{extra}\]'$"):
        use()


OWN = {
    "halves.py": "from skiprnn.data.digits import SequentialDigits\nclass Halves(SequentialDigits): pass\n",
    "conf/data/halves.yaml": "{name: halves, _target_: halves.Halves}\n",
    "conf/profile/halves/short.yaml": """# @package _global_
profile: {name: short}
seeds: [0, 1]
training: {epochs: 1, batch_size: 256, learning_rate: 1e-3}
""",
    "experiments/halves.yaml": """
title: own
source: nowhere
overrides: [data=halves]
rows: [{label: GRU, overrides: [model=gru, model.hidden_size=3]}]
""",
}


def test_what_is_the_users_own_is_found_where_a_command_starts(tmp_path, monkeypatch):
    """Data, profile and experiment, in new processes as well; ours stay what they are."""
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "conf" / "data" / "digits.yaml").write_text("{name: never}")
    wanted = ["experiment=halves", "data=halves", "profile=halves/short"]
    launcher = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2", "device=cpu", "threads=1"]
    done = command("train", "-m", *wanted, *launcher, module="skiprnn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| 2 / 2 " in (tmp_path / "outputs" / "tables" / "halves_short" / "table.md").read_text()
    monkeypatch.chdir(tmp_path)
    experiment, planned, _ = plan.requested(wanted)
    assert experiment
    assert [one.folder.complete for one in planned] == [True, True]
    (ours,) = plan.requested(["data=digits"])[1]
    assert ours.run.data["name"] == "digits"


def test_modules_import_in_one_direction():
    """No circles, also not by imports within functions, and nothing imports a command."""
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in MODULES}
    imports: dict[str, set[str]] = {}
    for name, file in modules.items():
        nodes = list(ast.walk(ast.parse((ROOT / file).read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= whole & modules.keys() or {str(node.module)}
        imports[name] = found & modules.keys() - {name, "skiprnn"}  # the package's own names are the model's
    commands = {f"skiprnn.{name}" for name in console.COMMANDS}
    assert not [(name, one) for name, others in imports.items() for one in others & commands]
    assert list(TopologicalSorter(imports).static_order())  # raises where there is a circle

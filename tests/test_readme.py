"""The code of README.md and of the pages that it links runs, make targets exist, files are there; the API page."""

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import skiprnn
from skiprnn import GatedState, Recurrent
from skiprnn.papers import experiments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "results/README.md", "conf/README.md", "experiments/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)}
    assert named
    assert named <= targets


def dry_run(target: str, *settings: str) -> list[str]:
    """The lines that make would run, whether or not make itself runs the tests."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", target, "PROFILE=smoke", "VENV=none", *settings]
    return subprocess.run(
        command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("name", [experiment.name for experiment in experiments.published()])
def test_every_table_has_its_make_target(name):
    line = dry_run(f"reproduce-{name.replace('adding500', 'adding-500')}", "ARGS=data.colour=red")[-1]
    data = experiments.load(name).data
    assert f"skiprnn.train -m experiment={name} data={data} profile={data}/smoke " in line
    assert line.endswith("data.colour=red")


@pytest.mark.parametrize(
    ("target", "experiment", "data"),
    [
        ("quickstart", "digits", "digits"),
        *((f"sweep-{data}", f"sweep_{data}", data) for data in ("mnist", "digits", "adding")),
    ],
)
def test_every_sweep_trains_and_then_draws_the_same_runs(target, experiment, data):
    lines = [line.split(" -m skiprnn.")[1].split() for line in dry_run(target, "ARGS=seed=7") if " -m skiprnn." in line]
    train, draw = lines[-2:]
    assert (train[:2], draw[0]) == (["train", "-m"], "figures")
    assert f"experiment={experiment}" in draw
    assert "seed=7" in draw
    assert experiments.load(experiment).data == data
    assert set(draw[1:]) <= set(train)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_first_page_is_short_and_leads_to_the_others():
    assert len(README.splitlines()) <= 110
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", README)}
    assert {page for page in PAGES[1:] if page.parent.name != "results"} <= linked


def test_the_table_is_the_published_one():
    assert (ROOT / "results" / "table1-paper" / "table.md").read_text().split("\n\n")[0] in README


def test_commands_that_pages_name_exist():
    """`python -m skiprnn.NAME`, and `skiprnn NAME` in a block."""
    for page in PAGES:
        for name in re.findall(r"python -m skiprnn\.(\w+)", page.read_text()):
            assert (ROOT / "skiprnn" / f"{name}.py").exists() or (ROOT / "skiprnn" / name).is_dir(), (page, name)


SIZES = {"B": 2, "T": 5, "I": 3, "H": 4, "L": 2, "D": 1}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> dict[str, str]:
    """The API page's text of each public name, as `make docs` makes it, without a warning."""
    folder = tmp_path_factory.mktemp("api")
    line = " ".join(dry_run("docs", f"ARGS=--output-directory {folder}")[-2:]).replace("\\ ", "")
    arguments = shlex.split(line)
    assert arguments[0].endswith("python")
    done = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    page = (folder / "skiprnn.html").read_text()
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    return {name: " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split()) for name, text in sections}


def test_the_api_page_has_every_public_name(api):
    assert set(api) == set(skiprnn.__all__)


@pytest.mark.parametrize("name", [name for name in skiprnn.__all__ if name not in ("GatedState", "Recurrent")])
def test_the_api_page_gives_the_shapes_that_a_call_has(name, api):
    def shape(before: str) -> tuple[int, ...]:
        sizes = re.search(re.escape(before) + r" \(([A-Z×, ]+)\)", api[name])
        assert sizes, f"{name} does not say what {before} is"
        return tuple(eval(size.replace("×", "*"), dict(SIZES)) for size in sizes[1].split(", "))

    output, state, updates = getattr(skiprnn, name)(SIZES["I"], SIZES["H"], SIZES["L"])(torch.randn(shape("x")))
    entries = {entry.shape for entry in (state if isinstance(state, tuple) else [state])}
    said = shape("output"), {shape("(h, c)" if name.endswith("LSTM") else "h")}, shape("updates")
    assert said == (output.shape, entries, updates.shape)


@pytest.mark.parametrize(("name", "thing"), [("Recurrent", Recurrent.forward), ("GatedState", GatedState)])
def test_the_api_page_has_the_shapes_of_docstrings_as_they_stand(name, thing, api):
    """What is between two asterisks would be slanted."""
    shapes = re.findall(r"\([A-Z][^()]*\)", str(thing.__doc__))
    assert len(shapes) > 1
    assert [one for one in shapes if one not in api[name]] == []

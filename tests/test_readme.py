"""The code of README.md and of the pages that it links runs, make targets exist, and files are there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

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

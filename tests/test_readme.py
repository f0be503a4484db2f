"""The README's code runs, its make targets exist, and its files are there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from skiprnn.papers import experiments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z0-9-]+)", README))
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


@pytest.mark.parametrize("data", ["mnist", "digits", "adding"])
def test_every_sweep_trains_and_then_draws_the_same_runs(data):
    lines = dry_run(f"sweep-{data}", "ARGS=seed=7")
    train, draw = (line.split(" -m skiprnn.")[1].split() for line in lines[-2:])
    assert (train[:2], draw[0]) == (["train", "-m"], "figures")
    assert f"experiment=sweep_{data}" in draw
    assert experiments.load(f"sweep_{data}").data == data
    assert set(draw[1:]) <= set(train)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_table_is_the_published_one():
    assert (ROOT / "results" / "digits" / "table.md").read_text().split("\n\n")[0] in README

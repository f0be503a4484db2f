"""The README's code runs, its make targets exist, and its files are there."""

import re
import subprocess
from pathlib import Path

import pytest

from skiprnn import experiments

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


@pytest.mark.parametrize("name", [experiment.name for experiment in experiments.published()])
def test_every_table_has_its_make_target(name):
    target = f"reproduce-{name.replace('adding500', 'adding-500')}"
    command = ["make", "--dry-run", target, "PROFILE=smoke", "VENV=none", "ARGS=data.colour=red"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    data = experiments.load(name).data
    assert f"skiprnn.train -m experiment={name} data={data} profile={data}/smoke " in said
    assert said.strip().endswith("data.colour=red")


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_table_is_the_published_one():
    assert (ROOT / "results" / "digits" / "table.md").read_text().split("\n\n")[0] in README

"""The page of a sweep from made-up records: its numbers, its progress, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import scale
from PIL import Image

from skiprnn import dashboard
from skiprnn.papers import plan
from skiprnn.papers.experiments import Experiment
from skiprnn.training.config import ConfigError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A sweep of 40 runs, 37 complete, one halfway, one failed, one not begun; and a run that no sweep planned."""
    output = tmp_path_factory.mktemp("output")
    planned = scale.planned_runs(scale.grid(output, 40))
    plan.save_plan(Experiment("", "Many runs", "", ()), "model=...", planned)
    for number, one in enumerate(planned[:-1]):
        scale.finish(one, 13 if number < 2 else scale.EPOCHS)
    planned[0].folder.fail(RuntimeError("lost <everything>"))
    Image.new("RGB", (9, 9)).save(planned[0].folder.path / "usage.png")
    (single,) = scale.planned_runs([["model=gru", "data=adding", f"output={output}", "seed=7", "training.epochs=30"]])
    single.folder.open().release()
    test = {"mse": 0.25, "state_updates": 50.0, "inference_flops": 1e6}
    facts = {"steps": 50, "solved_at": 1 / 600, "input_flops": 0.0}
    single.folder.finish(facts | {key: {"epoch": 0, "validation": test, "test": test} for key in ("best", "final")})
    return output


@pytest.fixture(scope="module")
def html(output):
    return dashboard.page(output, print)


def charts(html: str) -> list[dict]:
    """The numbers that the page's script draws."""
    return json.loads(re.search(r"^const views = (.*);$", html, re.MULTILINE)[1])


def test_page_says_how_far_each_sweep_is(html):
    titles = re.findall(r"<h2>(\w.*?)</h2>", html)
    assert titles == ["Many runs (digits)", "Many runs (mnist)", "single runs"]
    assert "20 runs: 18 complete, 1 begun, 1 failed, 0 waiting" in html
    assert f"{18 * scale.EPOCHS + 2 * 13} of {20 * scale.EPOCHS} epochs" in html
    assert "20 runs: 19 complete, 0 begun, 0 failed, 1 waiting" in html
    assert "RuntimeError: lost &lt;everything&gt;" in html


def test_page_shows_means_over_seeds_and_curves(html, output):
    digits, _, adding = charts(html)
    records = [json.loads(file.read_text()) for file in output.glob("digits/random_skip_gru_p0/*/record.json")]
    assert len(records) == 5
    accuracies = [record["best"]["test"]["accuracy"] for record in records]
    (row,) = [row for row in digits["rows"] if row["model"] == "random_skip_gru"]
    assert row["score"][0] == pytest.approx(sum(accuracies) / 5, rel=1e-4)
    assert row["epochs"] == [5 * scale.EPOCHS, 5 * scale.EPOCHS]
    epoch, mean, least, largest = row["curve"][-1]
    assert epoch == scale.EPOCHS
    assert (least, largest) == pytest.approx((min(accuracies), max(accuracies)), rel=1e-4)
    assert mean == pytest.approx(sum(accuracies) / 5, rel=1e-4)
    assert adding["score"] == "MSE"
    assert adding["rows"][0]["score"] == [0.25, 0.0]


def test_long_curves_are_thinned_and_end_at_the_last_epoch(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,validation/accuracy\n" + "".join(f"{epoch},{epoch / 1000}\n" for epoch in range(600)))
    curve = dashboard.curve([file, tmp_path / "missing.csv"], "validation/accuracy", print)
    assert len(curve) == dashboard.EPOCHS_DRAWN
    assert curve[-1] == [600, 0.599, 0.599, 0.599]


def test_filters_offer_models_and_costs(html):
    rows = charts(html)[0]["rows"]
    assert {(row["model"], row["lambda"]) for row in rows} == {
        *(("skip_lstm", "0"), ("skip_gru", "0")),
        *(("random_skip_lstm", "none"), ("random_skip_gru", "none")),
    }


def test_page_needs_no_network(html):
    ours = re.sub(r"<script>.*?</script>", "", html, count=1, flags=re.DOTALL)  # but for the library
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", ours))
    assert addresses == {"https://vega.github.io/schema/vega-lite/v6.json"}, "a name, which nobody fetches"


def test_command_writes_the_page(output, capsys):
    dashboard.main([str(output)])
    assert (output / "dashboard.html").read_text().startswith("<!doctype html>")
    assert str(output / "dashboard.html") in capsys.readouterr().out


def test_damaged_files_are_told_and_the_page_is_made_without_them(tmp_path, capsys):
    planned = scale.planned_runs(scale.grid(tmp_path, 40))
    plan.save_plan(Experiment("", "Many runs", "", ()), "model=...", planned)
    for one in planned:
        scale.finish(one)
    record, metrics, failure = (one.folder for one in planned[:3])
    (single,) = scale.planned_runs([["model=gru", "data=adding", f"output={tmp_path}", "seed=7"]])
    single.folder.open().release()
    damaged = [record.record_file, metrics.metrics_file, single.folder.path / "config.yaml"]
    damaged.append(tmp_path / "sweeps" / "0123abcd.json")
    failure.record_file.unlink()
    for file in (*damaged, failure.failure_file):
        file.write_bytes(b'{"half": ')
    with pytest.raises(SystemExit) as error:
        dashboard.main([str(tmp_path)])
    lines = str(error.value).splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert [sum(str(file) in line for line in lines) for file in damaged] == [1] * len(damaged)
    assert len(lines) == len(damaged)
    html = (tmp_path / "dashboard.html").read_text()
    assert "20 runs: 18 complete, 0 begun, 2 failed, 0 waiting" in html
    assert f"{record.record_file} is damaged; delete it" in html
    assert f"{failure.failure_file} is damaged" in html


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("experiment", "columns"), value) for value in (None, "x", [], ["accuracy"], ["colour", "state_updates"])),
        *((("rows", 0, "label"), value) for value in (None, True, [])),
        *((("rows", 0, "published"), value) for value in (None, [1], {"accuracy": "x"}, {"accuracy": [1, None]})),
        *((("profile",), value) for value in (None, [], {"name": "../x"}, {"note": 3})),
        *((("rows", 0, "config", "data"), value) for value in (None, [], {"name": "../../x"})),
    ],
)
def test_a_plan_that_cannot_be_shown_is_told_and_left_out(place, value, tmp_path):
    plan.save_plan(Experiment("", "Many runs", "", ()), "model=...", scale.planned_runs(scale.grid(tmp_path, 2)))
    (file,) = tmp_path.glob("sweeps/*.json")
    content = json.loads(file.read_bytes())
    part, told = content, []
    for key in place[:-1]:
        part = part[key]
    assert dashboard.plans(tmp_path, told.append)
    part[place[-1]] = value
    file.write_text(json.dumps(content))
    assert dashboard.plans(tmp_path, told.append) == []
    assert len(told) == 1
    assert str(file) in told[0]


def test_folder_without_runs(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no runs here"):
        dashboard.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [390, 1440])
def test_browser_draws_the_page(width, html, tmp_path):
    """In a frame as wide as a phone's screen and a desk's, without an error in the console."""
    probe = """<script>setTimeout(() => {
        const body = document.documentElement;
        parent.postMessage({drawn: document.querySelectorAll(".chart .marks").length,
                            overflow: body.scrollWidth - body.clientWidth}, "*");
    }, 1000)</script>"""
    (tmp_path / "page.html").write_text(html + probe)
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" width={width} height=800></iframe><pre></pre><script>onmessage = message =>'
        f' document.querySelector("pre").textContent = JSON.stringify(message.data)</script>'
    )
    options = ["--headless", "--no-sandbox", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    address = (tmp_path / "frame.html").as_uri()
    seen = subprocess.run([BROWSER, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    result = json.loads(re.search(r"<pre>(.*?)</pre>", seen.stdout)[1])
    assert result == {"drawn": 2, "overflow": 0}
    assert not [line for line in seen.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def wandb_library():
    return pytest.importorskip("wandb_workspaces", reason="needs the extra skiprnn[wandb]")


def test_workspace_has_the_views(wandb_library):
    workspace = dashboard.workspace("someone", "skiprnn")
    spec = json.dumps(workspace._to_model().model_dump(mode="json"))
    assert [len(section.panels) for section in workspace.sections] == [3, 4, 1]
    for key in ("test/accuracy", "test/state_updates", "validation/accuracy", "usage", "lambda"):
        assert key in spec


def test_workspace_without_a_key(wandb_library, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="needs a key"):
        dashboard.main(["--wandb", "someone/skiprnn"])


def test_workspace_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb needs wandb: pip install 'skiprnn\[wandb\]'"):
        dashboard.save_workspace("someone/skiprnn")

"""The page of a sweep from made-up records: its numbers, its progress, its server, and what a browser makes of it."""

import json
import re
import shutil
import sys
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import scale
from browser import MISSING, browser
from PIL import Image

from skiprnn import dashboard
from skiprnn.papers import plan
from skiprnn.papers.claims import read as judge
from skiprnn.papers.experiments import Experiment
from skiprnn.papers.records import exchange
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import locked_files
from skiprnn.views import page, workspace
from skiprnn.views.server import Server


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
    return page.html(output, print, page.judged(Path("results")))


def held(html: str) -> dict:
    """What the page's script has."""
    return json.loads(re.search(r"^let content = (.*);$", html, re.MULTILINE)[1])


def test_page_says_how_far_each_sweep_is(html):
    digits, mnist, single = held(html)["sweeps"]
    titles = ["Many runs (digits)", "Many runs (mnist)", "single runs"]
    assert [one["title"] for one in (digits, mnist, single)] == titles
    assert digits["counts"] == {"complete": 18, "begun": 1, "failed": 1}
    assert digits["epochs"] == [18 * scale.EPOCHS + 2 * 13, 20 * scale.EPOCHS]
    assert mnist["counts"] == {"complete": 19, "waiting": 1}
    (failed,) = [run for run in digits["runs"] if run["state"] == "failed"]
    assert failed["reason"] == "RuntimeError: lost <everything>"
    assert "lost <everything>" not in html, "text, not markup"


def test_a_run_that_a_process_has_is_running(output):
    (one,) = scale.planned_runs([["model=gru", "data=digits", f"output={output}", "seed=3"]])
    lock = one.folder.open()
    try:
        assert page.progress(one, 0, locked_files(), pytest.fail)["state"] == "running"
    finally:
        lock.release()
    assert page.progress(one, 0, locked_files(), pytest.fail)["state"] == "waiting"
    shutil.rmtree(one.folder.path)


def test_page_shows_means_over_seeds_and_curves(html, output):
    digits, _, adding = held(html)["sweeps"]
    records = [json.loads(file.read_text()) for file in output.glob("digits/random_skip_gru_p0/*/record.json")]
    assert len(records) == 5
    accuracies = [record["best"]["test"]["accuracy"] for record in records]
    (row,) = [row for row in digits["rows"] if row["model"] == "random_skip_gru"]
    assert row["score"][0] == pytest.approx(sum(accuracies) / 5, rel=1e-4)
    assert row["epochs"] == [5 * scale.EPOCHS, 5 * scale.EPOCHS]
    mean, least, largest = (line[-1] for line in row["curves"]["validation/accuracy"])
    assert row["curves"]["epoch"] == list(range(1, scale.EPOCHS + 1))
    assert row["curves"]["seconds"] == pytest.approx([1.5 * epoch for epoch in row["curves"]["epoch"]])
    assert (least, largest) == pytest.approx((min(accuracies), max(accuracies)), rel=1e-4)
    assert mean == pytest.approx(sum(accuracies) / 5, rel=1e-4)
    assert adding["score"] == "MSE"
    assert adding["rows"][0]["score"] == [0.25, 0.0]


def test_page_shows_each_run_with_its_settings(html, output):
    content = held(html)
    run = next(run for run in content["sweeps"][0]["runs"] if run["state"] == "complete")
    found, record = content["details"][run["name"]], json.loads((output / run["name"] / "record.json").read_text())
    assert found["config"]["model.cost_per_sample"] == record["config"]["model"]["cost_per_sample"]
    assert (
        found["record"]["best.test.accuracy"]
        == record["best"]["test"]["accuracy"]
        == pytest.approx(run["results"][0], rel=1e-4)
    )
    assert found["curves"]["epoch"] == list(range(1, scale.EPOCHS + 1))
    waiting = next(run["name"] for sweep in content["sweeps"] for run in sweep["runs"] if run["state"] == "waiting")
    assert content["details"][waiting]["record"] == {}, "nor a line without a name"
    assert len(content["details"]) == sum(len(sweep["runs"]) for sweep in content["sweeps"]) == 41


def test_page_shows_the_claims_with_their_verdicts(html):
    (claims, tests, protocols), found = (one["cells"] for one in held(html)["claims"]), judge(Path("results"))
    assert [line[1:] for line in claims] == [[one.text, one.source, one.best, one.last] for one in found]
    assert [line[1] for line in tests] == [test.statement for one in found for test in one.findings]
    assert any(folder == "table1" and "30 epochs instead of 600" in note for folder, note in protocols)


@pytest.mark.parametrize(
    ("places", "known"),
    [(None, True), ([{"pack": 1}], True), ([{"pack": 1}, {"pack": 6}], False), ([], False)],
)
def test_seconds_that_runs_shared_are_not_compared(places, known, tmp_path):
    """Nor those of a run that is underway beside others."""
    both = [["data=digits", f"output={tmp_path}", f"model={name}", "training.epochs=30"] for name in ("gru", "lstm")]
    planned = scale.planned_runs(both)
    plan.save_plan(None, "model=gru,lstm", planned)
    for one in planned:
        scale.finish(one)
    record = planned[1].folder.record()
    planned[1].folder.finish(record if places is None else record | {"places": places})
    (sweep,) = page.content(tmp_path, pytest.fail)["sweeps"]
    assert [row["curves"]["seconds"] is not None for row in sweep["rows"]] == [known] * 2
    assert (sweep["seconds"] == "seconds passed, training and validation") == known
    shown = page.detail(planned[1], pytest.fail)["record"]["seconds"]
    assert shown == (45.0 if known else "45 (of several runs at once)")


@pytest.mark.parametrize(("pack", "known"), [("", True), (1, True), (2, False)])
def test_seconds_of_a_run_underway_are_its_own_or_not(pack, known, tmp_path):
    """The first epoch's from before metrics.csv said it."""
    (one,) = scale.planned_runs([["data=digits", f"output={tmp_path}"]])
    plan.save_plan(None, "seed=0", [one])
    one.folder.path.mkdir(parents=True)
    one.folder.metrics_file.write_text(f"epoch,validation/accuracy,seconds,pack\n0,0.5,1,\n1,0.5,1,{pack}\n")
    (row,) = page.content(tmp_path, pytest.fail)["sweeps"][0]["rows"]
    assert row["curves"]["seconds"] == ([1, 2] if known else None)


def test_the_published_runs_that_shared_a_gpu_have_no_seconds(tmp_path):
    experiment, planned, _ = plan.requested(
        ["experiment=table1", "profile=mnist/paper", "seed=0", f"output={tmp_path}"]
    )
    exchange(planned, Path("results/table1-paper/records"))
    plan.save_plan(experiment, "experiment=table1", planned)
    (sweep,) = page.content(tmp_path, pytest.fail)["sweeps"]
    drawn = [row["curves"] for row in sweep["rows"] if row["curves"]["epoch"]]
    assert [curves["epoch"][-1] for curves in drawn] == [600] * 6
    assert [curves["seconds"] for curves in drawn] == [None] * 6


def test_long_curves_are_thinned_and_end_at_the_last_epoch(tmp_path):
    (one,) = scale.planned_runs([[f"output={tmp_path}"]])
    one.folder.path.mkdir(parents=True)
    one.folder.metrics_file.write_text(
        "epoch,validation/accuracy,seconds\n" + "".join(f"{epoch},{epoch / 1000},1\n" for epoch in range(600))
    )
    record = {"examples": {"train": 640}}
    curves = page.of_row_curves(
        one.run, page.curves_of([one], pytest.fail), ["validation/accuracy"], "seconds", record, 1
    )
    assert len(curves["epoch"]) == page.POINTS
    assert [line[-1] for line in curves["validation/accuracy"]] == [0.599] * 3
    assert (curves["epoch"][-1], curves["steps"][-1], curves["seconds"][-1]) == (600, 6000, 600)


def test_a_shorter_run_and_an_interrupted_longer_one(tmp_path):
    """The longer one's epochs are the shorter's, and it has no metrics.csv of its own yet."""
    both = [["data=digits", f"output={tmp_path}", f"training.epochs={n}"] for n in (scale.EPOCHS, 60)]
    shorter, longer = scale.planned_runs(both)
    plan.save_plan(None, "training.epochs=30,60", [shorter, longer])
    scale.finish(shorter)
    longer.folder.path.mkdir(parents=True)
    (sweep,) = page.content(tmp_path, pytest.fail)["sweeps"]
    assert [run["epochs"] for run in sweep["runs"]] == [[30, 30], [30, 60]]
    assert [run["state"] for run in sweep["runs"]] == ["complete", "begun"]


def test_filters_offer_models_and_costs(html):
    rows = held(html)["sweeps"][0]["rows"]
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
    sweep = held((tmp_path / "dashboard.html").read_text())["sweeps"][0]
    assert sweep["counts"] == {"complete": 18, "failed": 2}
    reasons = [run["reason"] for run in sweep["runs"] if run["state"] == "failed"]
    assert f"{record.record_file} is damaged; delete it" in reasons[0]
    assert f"{failure.failure_file} is damaged" in reasons[1]


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
    assert page.sweeps(tmp_path, told.append)
    part[place[-1]] = value
    file.write_text(json.dumps(content))
    assert page.sweeps(tmp_path, told.append) == []
    assert len(told) == 1
    assert str(file) in told[0]


def test_folder_without_runs(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no runs here"):
        dashboard.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


# served


@pytest.fixture
def address(output):
    with Server(0, output, ()) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_server_gives_the_page_its_content_runs_and_pictures(address, output):
    def ask(path):
        with urlopen(address + path, timeout=60) as answer:
            return answer.read()

    html = ask("/").decode()
    assert "details" not in held(html)
    content = json.loads(ask("/content.json"))
    assert content["sweeps"] == held(html)["sweeps"]
    pictured = next(name for sweep in content["sweeps"] for name in sweep["pictures"])
    assert json.loads(ask(f"/run.json?{quote(pictured, safe='')}"))["picture"]
    assert ask(f"/{quote(pictured)}/usage.png") == (output / pictured / "usage.png").read_bytes()


@pytest.mark.parametrize(
    "path", ["/run.json?no/such/run", f"/{quote('../../etc/passwd')}", "/nothing", "/a/b/usage.png"]
)
def test_server_gives_nothing_else(address, path):
    with pytest.raises(HTTPError, match="404"):
        urlopen(address + path, timeout=60)


def test_server_answers_this_machine_alone(address):
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(address, headers={"Host": "elsewhere.example:80"}), timeout=60)


def test_a_port_that_is_taken(address, output):
    with pytest.raises(SystemExit, match="--serve 0 takes a port that is free"):
        dashboard.main([str(output), "--serve", address.rpartition(":")[2]])


# in a browser


@pytest.fixture(scope="module", params=[390, 1440])
def window(request):
    if MISSING:
        pytest.skip(MISSING)
    with browser(request.param) as window:
        yield window


DRAWN = "[...document.querySelectorAll('.chart svg.marks')].filter(drawing => drawing.checkVisibility()).length"
SIZES = "const page = document.documentElement; return [page.scrollWidth - page.clientWidth, page.scrollHeight]"


def show(window, address: str, charts: int) -> None:
    """Open it, wait until it is drawn; it fits the width, and the console is silent."""
    window.open("about:blank")
    window.open(address)
    window.until(f"{DRAWN} === {charts}")
    overflow, height = window.run(SIZES)
    assert overflow == 0
    assert height < 20_000
    assert window.messages() == []


def choose(window, name: str, value: str) -> None:
    window.run(
        "const field = document.querySelector(`form [name=${arguments[0]}]`);"
        "field.value = arguments[1]; field.dispatchEvent(new Event('input'))",
        name,
        value,
    )


@pytest.fixture
def file(html, tmp_path):
    (tmp_path / "page.html").write_text(html)
    return (tmp_path / "page.html").as_uri()


def rows_shown(window) -> list[str]:
    return window.run("return [...document.querySelectorAll('#results tbody tr')].map(row => row.cells[0].textContent)")


def test_browser_shows_all_columns(window, file):
    show(window, file, charts=2)
    if window.run("return innerWidth") > 1000:
        assert window.run("const box = document.querySelector('#results'); return box.scrollWidth <= box.clientWidth")


def test_browser_sorts(window, file, html):
    show(window, f"{file}#sort=Accuracy", charts=2)
    rows = held(html)["sweeps"][0]["rows"]
    by_accuracy = [row["label"] for row in sorted(rows, key=lambda row: row["score"][0])]
    assert rows_shown(window) == by_accuracy
    window.run("document.querySelector('#results th[aria-sort] button').click()")
    assert rows_shown(window) == by_accuracy[::-1]


def test_browser_searches_and_keeps_it_in_the_address(window, file):
    show(window, file, charts=2)
    everything = rows_shown(window)
    choose(window, "search", "random gru")
    found = rows_shown(window)
    assert 0 < len(found) < len(everything)
    assert all("random_skip_gru" in label for label in found)
    address = window.run("return location.href")
    show(window, address, charts=2)
    assert rows_shown(window) == found


def test_browser_without_a_match(window, file):
    show(window, f"{file}#search=nothing+at+all", charts=0)
    assert window.run("return document.querySelector('#nothing').offsetHeight") > 0
    window.run("document.querySelector('#all').click()")
    window.until(f"{DRAWN} === 2")


def test_browser_draws_a_curve_of_one_epoch(window, tmp_path):
    (one,) = scale.planned_runs([["data=digits", f"output={tmp_path}", "training.epochs=2"]])
    one.folder.path.mkdir(parents=True)
    one.folder.metrics_file.write_text("epoch,validation/accuracy,seconds\n0,0.5,1\n")
    one.folder.last.touch()
    plan.save_plan(None, "seed=0", [one])
    dashboard.main([str(tmp_path)])
    show(window, (tmp_path / "dashboard.html").as_uri(), charts=1)
    points = "return document.querySelectorAll('#learning .mark-symbol.role-mark path').length"
    assert window.run(points) == 1


def test_browser_leaves_out_charts_of_what_has_not_begun(window, tmp_path):
    """Chart and heading, also where another row's was drawn before."""
    both = [["data=digits", f"output={tmp_path}", f"model={name}"] for name in ("gru", "skip_lstm")]
    complete, waiting = scale.planned_runs(both)
    plan.save_plan(None, "model=gru,skip_lstm", [complete, waiting])
    scale.finish(complete)
    dashboard.main([str(tmp_path)])
    file = (tmp_path / "dashboard.html").as_uri()
    headings = (
        "return [...document.querySelectorAll('#seen h3, #curves h3')].filter(one => one.checkVisibility()).length"
    )
    show(window, file, charts=2)
    assert window.run(headings) == 2
    choose(window, "model", "skip_lstm")
    window.until(f"{DRAWN} === 0")
    assert len(rows_shown(window)) == 1
    assert window.run(headings) == 0
    show(window, f"{file}#run={quote(complete.run.name, safe='')}", charts=4)
    assert window.run(headings) == 4
    show(window, f"{file}#run={quote(waiting.run.name, safe='')}", charts=0)
    window.until(f"document.querySelector('#run h2').textContent === '{waiting.run.name}'")
    assert window.run(headings) == 0


@pytest.mark.parametrize("x", ["seconds", "steps", "epoch"])
def test_browser_draws_by_every_axis(window, file, x):
    show(window, f"{file}#x={x}&smooth=0.9&metric=validation%2Fstate_updates", charts=2)
    title = window.run("return document.querySelector('#learning').previousSibling.textContent")
    known = {"steps": "epoch"}  # made-up records do not say of how many examples they are
    assert title.startswith(f"State updates by {known.get(x, x)}")


def test_browser_shows_a_run_beside_another(window, file, html):
    first, *_, other = [run["name"] for run in held(html)["sweeps"][0]["runs"] if run["state"] == "complete"]
    show(window, f"{file}#run={quote(first, safe='')}&beside={quote(other, safe='')}", charts=4)
    settings = window.run(
        "return [...document.querySelectorAll('#settings .differs')].map(row => row.cells[0].textContent)"
    )
    assert {"model.name", "model.cell", "model.policy", "model.p_skip"} <= set(settings)
    assert "training.epochs" not in settings
    labels = "document.querySelectorAll('#curves > :last-child .role-axis-label text')"
    scale_of = window.run(f"return [...{labels}].map(one => +one.textContent)")
    assert 0.001 in scale_of, "of the learning rate, which is constant"
    window.run("document.querySelector('#back').click()")
    window.until(f"{DRAWN} === 2")


def test_browser_shows_the_claims(window, file, html):
    show(window, f"{file}#sweep=claims", charts=0)
    text = window.run("return document.querySelector('#claims').innerText")
    assert all(claim[1] in text for claim in held(html)["claims"][0]["cells"])


def test_browser_follows_a_sweep(window, tmp_path):
    """Served, the page sees a run come to its end without being asked."""
    planned = scale.planned_runs(
        [["data=digits", f"output={tmp_path}", "training.epochs=30", "training.cost_free_epochs=0"]]
    )
    plan.save_plan(None, "seed=0", planned)
    with Server(0, tmp_path, ()) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        show(window, f"http://127.0.0.1:{server.server_port}/", charts=0)
        assert "1 waiting" in window.run("return document.querySelector('#far').textContent")
        scale.finish(planned[0])
        window.until("document.querySelector('#far').textContent.includes('1 complete')")
        window.until(f"{DRAWN} === 2")
        assert window.messages() == []
        server.shutdown()


# on wandb


@pytest.fixture
def wandb_library():
    return pytest.importorskip("wandb_workspaces", reason="needs the extra skiprnn[wandb]")


def test_workspace_has_the_views(wandb_library):
    made = workspace.workspace("someone", "skiprnn")
    spec = json.dumps(made._to_model().model_dump(mode="json"))
    assert [len(section.panels) for section in made.sections] == [3, 4, 1]
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
        workspace.save("someone/skiprnn")

"""The examples run as a user would run them."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "own_time_series.py"


@pytest.fixture
def run(monkeypatch):
    """A function: arguments -> the script's end, in this process."""

    def start(*arguments: object, script: Path = SCRIPT) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")

    return start


def test_time_series_without_a_file_draws_its_own_and_learns_it(tmp_path):
    command = [sys.executable, SCRIPT, "--plot", tmp_path / "waves.png", "--epochs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-2]
    error, repeated, read = (
        float(part.split()[0].rstrip(";")) for part in last.replace("error ", ": ").split(": ")[2:]
    )
    assert error < repeated
    assert 0 < read <= 100
    assert (tmp_path / "waves.png").read_bytes().startswith(b"\x89PNG")
    columns, first = (tmp_path / "waves.csv").read_text().splitlines()[:2]
    assert columns == "fast,slow,load"
    assert len(first.split(",")) == 3


@pytest.mark.parametrize(("separator", "mark"), [(",", "."), (";", ","), (";", "."), ("\t", ".")])
def test_time_series_takes_what_tables_there_are(run, tmp_path, capsys, separator, mark):
    """Any separator, decimal commas, a byte order mark; dates in any order, text and gaps are said before training."""
    rows = []
    for k in range(299, -1, -1):  # the latest first
        sold = "" if k % 50 == 3 else "inf" if k == 7 else f"{k % 5}{mark}5"
        rows.append([f"2024-{1 + k // 28 % 12:02}-{1 + k % 28:02}", "shop", str(k % 7), sold])
    text = "\n".join(separator.join(row) for row in [["date", "place", "weekday", "sold"], *rows[:]])
    (tmp_path / "own.csv").write_text(text, encoding="utf-8-sig")
    options = ["--target", "sold", "--window", 14, "--horizon", 3, "--epochs", 1, "--plot", tmp_path / "own.png"]
    run(tmp_path / "own.csv", *options)
    said = capsys.readouterr().out.split("epoch 1/1")[0].splitlines()
    assert said == [
        "rows are put in the order of date",
        "left out, for they are not numbers: date, place",
        "sold: 7 of 300 values are missing, filled with the value before",
    ]
    assert (tmp_path / "own.png").exists()


def test_time_series_are_read_in_the_order_of_their_dates(tmp_path):
    read = runpy.run_path(str(SCRIPT))["read"]
    (tmp_path / "own.csv").write_text("when,y\n2024-01-03,3,\n2024-01-01,1,\n2024-01-02,,\n".replace(",\n", "\n"))
    table, target = read(tmp_path / "own.csv", None)
    assert (target, table["y"].tolist()) == ("y", [1.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "nowhere/own.png"], "own.png cannot be written: "),
        (["--plot", "own.txt"], "own.txt must end with one of "),
        (["--learning-rate", "1e30", "--plot", "own.png"], "in epoch 1: too large a --learning-rate?"),
    ],
)
def test_time_series_end_before_time_is_lost(run, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("own.csv").write_text("a,b\n" + "".join(f"{k % 3},{k % 7}\n" for k in range(400)))
    with pytest.raises(SystemExit) as error:
        run("own.csv", *options)
    assert message in str(error.value)
    assert "epoch 1/" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n" + "1,2\n" * 200, ["--target", "c"], "has the numeric columns a, b; choose one by --target"),
        ("name\n" + "x\n" * 200, [], r"has the numeric columns (none)"),
        ("a,b\n" + "1,2\n" * 20, [], "20 rows are too few for --window 48 and --horizon 1"),
        ("", [], "error: cannot read"),
    ],
)
def test_time_series_errors_are_one_line(run, tmp_path, content, options, message):
    (tmp_path / "own.csv").write_text(content)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "own.csv", *options, "--plot", tmp_path / "own.png")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "own.png").exists()


def test_an_lstm_learns_to_skip(run, capsys):
    """It starts as the LSTM that it was."""
    run("--hidden", 24, "--epochs", 6, "--more", 8, "--cost", 2e-2, script=EXAMPLES / "finetune_lstm.py")
    lines = capsys.readouterr().out.splitlines()[:4]
    accuracy, updates = zip(*(map(float, re.findall(r" (\d+\.\d+)", line)) for line in lines), strict=True)
    assert accuracy[1] == accuracy[0] > 0.5
    assert updates[:2] == (32.0, 32.0)
    assert updates[2] < 30
    assert accuracy[2] > 0.5


def test_text_of_any_length_is_classified(run, tmp_path, capsys):
    for name, letters in (("one", "abcde"), ("other", "vwxyz")):
        lines = [(letters * 20)[k % 5 :][: 12 + k % 60] for k in range(150)]
        (tmp_path / name).write_text("\n".join(lines))
    run(tmp_path / "one", tmp_path / "other", "--epochs", 3, script=EXAMPLES / "text_classification.py")
    right, read = re.search(
        r"held out: ([\d.]+) of 60 lines right; characters read: (\d+) %", capsys.readouterr().out
    ).groups()
    assert float(right) > 0.9
    assert 0 < int(read) <= 100
    with pytest.raises(SystemExit, match="needs two files with ten lines"):
        run(tmp_path / "one", script=EXAMPLES / "text_classification.py")
    with pytest.raises(SystemExit, match=r"cannot read .*none"):
        run(tmp_path / "none", script=EXAMPLES / "text_classification.py")


def test_text_without_files_is_pythons_own():
    prose, code = runpy.run_path(str(EXAMPLES / "text_classification.py"))["prose_and_code"]()
    assert min(len(prose), len(code)) > 500
    assert "import os" in code


def test_lightning_trains_in_mixed_precision(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(script=EXAMPLES / "lightning_module.py")
    found = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert found["accuracy"] > 0.5
    assert 1 <= found["state_updates"] <= 16
    assert not list(tmp_path.iterdir())


def test_a_saved_network_goes_on_from_a_saved_state(run, capsys, tmp_path):
    run(tmp_path, script=EXAMPLES / "save_and_load.py")
    assert capsys.readouterr().out.startswith("went on exactly, at ")
    assert {path.name for path in tmp_path.iterdir()} == {"network.pt", "state.pt"}


def test_every_example_is_run():
    text = Path(__file__).read_text()
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r"\w+\.py", text)) - {"test_examples.py"}

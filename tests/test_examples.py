"""The examples run as a user would run them."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "own_time_series.py"


@pytest.fixture
def run(monkeypatch):
    """A function: arguments -> the script's end, in this process."""

    def start(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

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


def test_time_series_takes_any_numeric_columns(run, tmp_path):
    rows = "".join(f"day {k},{k % 7},{'' if k % 50 == 3 else k % 5}\n" for k in range(300))
    (tmp_path / "own.csv").write_text(f"date,weekday,sold\n{rows}")
    options = ["--target", "sold", "--window", 14, "--horizon", 3, "--epochs", 1, "--plot", tmp_path / "own.png"]
    run(tmp_path / "own.csv", *options)
    assert (tmp_path / "own.png").exists()


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

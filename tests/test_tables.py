"""Tables from made-up records whose means are known."""

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from conftest import CONF, compose, make_small_ucf101, next_steps, trained
from test_experiments import TABLE_1, planned_runs

from skiprnn import Recurrent, dashboard, figures, tables
from skiprnn.data.ucf101 import cnn_flops
from skiprnn.papers import experiments, plan, records, statistics, table
from skiprnn.papers.experiments import Experiment, Row
from skiprnn.papers.plan import PlannedRun
from skiprnn.training import command_line
from skiprnn.training import measures as metrics
from skiprnn.training.config import DivergedError
from skiprnn.training.setup import make_data


def moved(planned: Sequence[PlannedRun], output: Path) -> list[PlannedRun]:
    """The same runs in another output folder."""
    return [dataclasses.replace(one, run=dataclasses.replace(one.run, output=str(output))) for one in planned]


PUBLISHED = sorted(Path(CONF).parent.glob("results/*/table.md"))


@pytest.fixture
def planned(tmp_path):
    """Table I's runs under the published protocol, four seeds a row, in a temporary folder."""
    return moved(planned_runs("table1", "mnist/paper"), tmp_path)


def finish(one: PlannedRun, facts: dict | None = None, **test: float) -> None:
    """Write the record of a complete run with these results at its best epoch, and half of them at its last; only the
    test set must be read."""
    facts = {"steps": 784, "solved_at": None, "input_flops": 0.0} | (facts or {})
    wrong, half = dict.fromkeys(test, 123.0), {name: value / 2 for name, value in test.items()}
    one.folder.path.mkdir(parents=True, exist_ok=True)
    results = {"best": {"epoch": 1, "test": test}, "final": {"epoch": 2, "test": half}}
    results = {epoch: content | {"validation": wrong} for epoch, content in results.items()}
    one.folder.finish({"config": one.run.identity} | results | facts)


def finish_row(planned: list[PlannedRun], label: str, accuracies=(), updates=(), flops=()) -> None:
    """Complete the first runs of a row."""
    runs = [one for one in planned if one.row.label == label]
    assert len(runs) == 4
    for one, a, u, f in zip(runs, accuracies, updates, flops, strict=False):
        finish(one, accuracy=a, state_updates=u, inference_flops=f)


def publish(planned: list[PlannedRun], experiment: Experiment | None = None) -> tuple[str, str, pd.DataFrame]:
    """The Markdown, LaTeX and CSV that are written."""
    experiment = experiment or experiments.load("table1")
    table.publish(experiment, planned)
    folder = Path(planned[0].run.output) / "tables" / f"{experiment.name}_{planned[0].run.profile['name']}"
    return (folder / "table.md").read_text(), (folder / "table.tex").read_text(), pd.read_csv(folder / "table.csv")


def cells(markdown: str) -> dict[str, dict[str, str]]:
    """The first table of a Markdown text as {model: {column: text}}."""
    first = markdown.split("\n\n")[0]
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


# rendering


def test_means_and_sample_standard_deviations_stand_beside_the_published_numbers(planned):
    finish_row(planned, "LSTM", (0.90, 0.92, 0.94, 0.96), (784.0,) * 4, (3.829e7,) * 4)
    finish_row(planned, "Skip LSTM, λ = 1e-4", (0.96, 0.98), (300.0, 310.0), (1.4e7, 1.6e7))
    finish_row(planned, "GRU (p_skip = 0.5)", (0.9114,), (391.0,), (1.432e7,))
    markdown, _, numbers = publish(planned)
    shown = cells(markdown)
    assert list(shown) == list(TABLE_1)
    assert shown["LSTM"] == {
        "Accuracy": "0.930 ± 0.026",  # √(20e-4 / 3) = 0.0258; the population's would be 0.022
        "State updates": "784.00 ± 0.00",
        "Inference FLOPs": "3.83e7",
        "Accuracy (last epoch)": "0.465 ± 0.013",
        "State updates (last epoch)": "392.00 ± 0.00",
        "Accuracy (paper)": "0.910 ± 0.045",
        "State updates (paper)": "784.00 ± 0.00",
        "Inference FLOPs (paper)": "3.83e7",
        "Runs": "4 / 4",
    }
    skip = shown["Skip LSTM, λ = 1e-4"]
    assert (skip["Accuracy"], skip["State updates"], skip["Inference FLOPs"], skip["Runs"]) == (
        "0.970 ± 0.014",
        "305.00 ± 7.07",
        "1.50e7",
        "2 / 4",
    )
    single = shown["GRU (p_skip = 0.5)"]  # one run has no spread
    assert (single["Accuracy"], single["State updates"], single["Runs"]) == ("0.911", "391.00", "1 / 4")

    numbers = numbers.set_index("model")
    assert list(numbers.index) == list(TABLE_1)
    assert numbers.accuracy_mean["LSTM"] == pytest.approx(0.93)
    assert numbers.accuracy_std["LSTM"] == pytest.approx(math.sqrt(20e-4 / 3))
    assert numbers.state_updates_std["Skip LSTM, λ = 1e-4"] == pytest.approx(math.sqrt(50))
    assert math.isnan(numbers.accuracy_std["GRU (p_skip = 0.5)"])
    assert numbers.runs_done.tolist() == [4, 0, 2, 0, 1, 0, 0, 0]
    assert numbers.runs_planned.tolist() == [4] * 8


def test_a_row_without_complete_runs_shows_so(planned):
    finish_row(planned, "LSTM", (0.9,), (784.0,), (3.8e7,))
    for markdown in (publish(planned)[0], publish(planned[4:])[0]):  # beside a row with runs; and no run at all
        shown = cells(markdown)
        assert shown["GRU"] == {
            "Accuracy": "–",
            "State updates": "–",
            "Inference FLOPs": "–",
            "Accuracy (last epoch)": "–",
            "State updates (last epoch)": "–",
            "Accuracy (paper)": "0.968 ± 0.013",
            "State updates (paper)": "784.00 ± 0.00",
            "Inference FLOPs (paper)": "2.87e7",
            "Runs": "0 / 4",
        }
        not_in_the_paper = shown["SA-GRU, λ = 1e-4 (not in the paper)"]
        assert set(not_in_the_paper.values()) == {"–", "0 / 4"}


def diverge(one: PlannedRun) -> None:
    """What training leaves of a run whose loss became nan."""
    one.folder.path.mkdir(parents=True, exist_ok=True)
    one.folder.fail(DivergedError("the train loss became nan in epoch 3"))


def test_failed_and_unfinished_runs_do_not_count(planned):
    first = planned[0]
    first.folder.path.mkdir(parents=True)
    first.folder.fail(RuntimeError("diverged"))
    first.folder.last.write_bytes(b"half-way")
    markdown = publish(planned)[0]
    assert cells(markdown)["LSTM"]["Runs"] == "0 / 4"
    assert "diverged run is done" not in markdown


def test_diverged_runs_count_and_leave_their_row_without_a_verdict(planned):
    for label in ("LSTM", "GRU"):
        finish_row(planned, label, (0.96, 0.96, 0.97), (784.0,) * 3, (3.829e7,) * 3)
    diverge(planned[3])
    markdown, _, numbers = publish(planned)
    assert [cells(markdown)[label]["Runs"] for label in ("LSTM", "GRU")] == ["4 / 4, 1 diverged", "3 / 4"]
    assert cells(markdown)["LSTM"]["Accuracy"] == "0.963 ± 0.006"  # of those that have one
    assert "A diverged run is done, has solved nothing, and is in no mean." in markdown
    judged = numbers.set_index("model")
    assert judged.accuracy_verdict["LSTM"] == "undecided"
    assert judged.accuracy_verdict["GRU"] == "reproduced"
    finish(planned[3], accuracy=0.95, state_updates=784.0, inference_flops=3.829e7)  # tried anew, it came to an end
    assert cells(publish(planned)[0])["LSTM"]["Runs"] == "4 / 4"


def test_the_published_numbers_are_the_papers(planned):
    numbers = publish(planned)[2].set_index("model")
    for label, (*_, accuracy, updates, flops) in TABLE_1.items():
        row = numbers.loc[label]
        for metric, expected in (("accuracy", accuracy), ("state_updates", updates)):
            stated = [row[f"published_{metric}_mean"], row[f"published_{metric}_std"]]
            assert all(pd.isna(value) for value in stated) if expected is None else stated == expected
        assert (
            pd.isna(row.published_inference_flops_mean)
            if flops is None
            else row.published_inference_flops_mean == flops
        )


def test_regression_shows_the_squared_error(tmp_path):
    row = Row("LSTM", ("data=adding", "model=lstm"), {"mse": 1.67e-3})
    experiment = Experiment("adding_test", "Adding", "hand-made", (row,), ("mse", "state_updates"))
    planned = plan.runs(experiment, [["profile=digits/smoke", "seed=0", f"output={tmp_path}"]], compose)
    finish(planned[0], mse=0.0012345, state_updates=50.0, inference_flops=2.46e6)
    line = cells(publish(planned, experiment)[0])["LSTM"]
    assert (line["MSE"], line["MSE (paper)"], line["State updates"]) == ("0.001234", "0.001670", "50.00")
    assert "Accuracy" not in line


def test_the_caption_states_the_protocol(planned):
    caption = table.caption(experiments.load("table1"), planned)
    for part in (
        "Table I: sequential MNIST. The published protocol. 600 epochs, batch 256, Adam, learning rate 0.0001",
        "norm clipped at 1. ",
        "Test set at the epoch with the best validation score and, where it says so, at the last epoch; mean ± sample",
        "Table I of the two-page version, which is Table 2 of ICLR 2018",
        "Campos et al.",
    ):
        assert part in caption
    assert "λ = 0" not in caption
    assert caption.count("Table 2") == 1
    overrides = ["training.epochs=7", "training.decay_epochs=2", "training.cost_free_epochs=3"]
    shortened = table.caption(
        experiments.load("table1"),
        plan.runs(experiments.load("table1"), [["experiment=table1", "profile=mnist/cpu", *overrides]], compose),
    )
    assert f"instead of four. Here with {', '.join(overrides)}. LSTM" in shortened
    assert "Here with" not in caption
    assert "λ = 0 before epoch 4. Test set at the epoch with the best validation score (since λ counts)" in shortened
    assert "learning rate 0.0005 (falling after epoch 5)," in shortened


def test_the_caption_tells_the_rows_of_each_protocol(tmp_path):
    same = [f"training.{setting}" for setting in ("learning_rate=5e-4", "cost_free_epochs=0", "decay_epochs=0")]
    overrides = ["experiment=table1", "profile=mnist/cpu", *same]
    grid = [[*overrides, f"training.epochs={epochs}", f"rows=[{rows}]"] for epochs, rows in [(16, "1,3"), (8, "4")]]
    experiment = experiments.load("table1")
    planned = [one for choice in grid for one in plan.runs(experiment, [choice], compose)]
    caption = table.caption(experiment, planned)
    assert "LSTM, Skip LSTM, λ = 1e-4: 16 epochs, batch 16, " in caption
    assert "clipped at 1; GRU: 8 epochs, batch 16, " in caption
    here = moved(planned, tmp_path)
    for runs, differ in ((here, True), (here[:2], False)):
        markdown, tex, _ = publish(runs)
        assert markdown.startswith("Rows trained by different protocols are not comparable") is differ
        assert (r"\caption{Rows trained by different protocols" in tex) is differ


def adding(tmp_path: Path, errors: dict[str, list[float]]) -> tuple[Experiment, list[PlannedRun]]:
    """The adding task's table from runs with these squared errors, row by row."""
    experiment, planned = experiments.load("adding"), moved(planned_runs("adding", "adding/paper"), tmp_path)
    for label, values in errors.items():
        runs = [one for one in planned if one.row.label == label]
        for one, error in zip(runs, values, strict=False):
            facts = {"steps": 50, "solved_at": 1 / 600, "note": "drawn by hand"}
            finish(one, facts, mse=error, state_updates=25.0, inference_flops=1e6)
    return experiment, planned


def test_a_task_is_solved_if_it_is_in_all_runs(tmp_path):
    errors = {
        "LSTM": [1e-4, 1.6e-3, 1e-4],
        "GRU": [1e-4, 1.7e-3],
        "LSTM (p_skip = 0.5)": [0.1, 0.05, 0.1],
        "LSTM (p_skip = 0.2)": [1e-4, 1e-4, 1e-4],
        "Skip GRU, λ = 0": [1e-9, 1e-9],
        "Skip LSTM, λ = 0": [0.1, 0.1, 0.1],
        "Skip LSTM, λ = 1e-5": [1e-4, 1e-4, 1e-4],
    }
    experiment, planned = adding(tmp_path, errors)
    diverge(next(one for one in planned if one.row.label == "Skip LSTM, λ = 1e-5" and not one.folder.complete))
    markdown, _, numbers = publish(planned, experiment)
    column = {model: (line["Task solved"], line["Task solved (paper)"]) for model, line in cells(markdown).items()}
    assert column["LSTM"] == ("yes", "yes")
    assert column["GRU"] == ("50% of runs", "yes")
    assert column["LSTM (p_skip = 0.5)"] == ("no", "no")
    assert column["Skip GRU, λ = 1e-5"] == ("–", "yes")
    judged = numbers.set_index("model").task_solved_verdict
    assert judged["LSTM"] == judged["LSTM (p_skip = 0.5)"] == "reproduced"
    assert judged["LSTM (p_skip = 0.2)"] == "differs (solved)"
    assert judged["Skip LSTM, λ = 0"] == "differs (not solved)"
    assert judged["GRU"] == judged["Skip GRU, λ = 0"] == judged["Skip GRU, λ = 1e-5"] == "undecided"
    assert column["Skip LSTM, λ = 1e-5"] == ("75% of runs", "yes"), "the diverged one has not solved it"
    assert judged["Skip LSTM, λ = 1e-5"] == "undecided"
    assert "Solved: an MSE below 0.00167. Data: drawn by hand." in markdown
    assert "Of a task, reproduced is what all runs show as published" in markdown
    assert cells(markdown)["LSTM"]["State updates (%)"] == "50.0 ± 0.0"  # 25 of 50


@pytest.mark.parametrize(
    ("data", "solved_at"), [("adding", 1 / 600), ("adding_sarnn", 1 / 600), ("frequency", 0.99), ("digits", None)]
)
def test_the_criterion_is_the_papers(data, solved_at):
    """A hundredth of the variance 1/6 of a sum of two values that are uniform on a unit interval; over 99 %."""
    run = command_line.read(compose([f"data={data}"]))
    assert make_data(run).solved_at == pytest.approx(solved_at)


def test_the_last_epoch_stands_beside_the_best_and_is_compared_with_the_same_published_number(tmp_path):
    overrides = ["experiment=frequency", "profile=frequency/paper", "rows=[4]", "seed=0,1,2", f"output={tmp_path}"]
    experiment, planned, _ = plan.requested(overrides)
    facts = {"solved_at": 0.99, "steps": 100, "note": None}
    for one, final, updates in zip(planned, (0.995, 0.5, 0.5), (12.3, 12.7, 13.1), strict=True):
        finish(one, facts, accuracy=0.999, state_updates=59.0, inference_flops=1e6)
        record = one.folder.record()
        record["final"]["test"] = {"accuracy": final, "state_updates": updates, "inference_flops": 1e6}
        one.folder.record_file.write_text(json.dumps(record))
    markdown, _, numbers = publish(planned, experiment)
    assert cells(markdown)["Skip LSTM, λ = 1e-4 (1 ms)"] == {
        "Task solved": "yes",
        "Accuracy": "0.999 ± 0.000",
        "State updates": "59.00 ± 0.00",
        "Inference FLOPs": "1.00e6",
        "Task solved (last epoch)": "33% of runs",
        "Accuracy (last epoch)": "0.665 ± 0.286",
        "State updates (last epoch)": "12.70 ± 0.40",
        "Task solved (paper)": "yes",
        "State updates (paper)": "12.70 ± 0.50",
        "Runs": "3 / 3",
    }
    judged = numbers.iloc[0]
    assert (judged.task_solved_verdict, judged.last_task_solved_verdict) == ("reproduced", "undecided")
    assert (judged.state_updates_verdict, judged.last_state_updates_verdict) == ("differs (higher)", "reproduced")


def test_accuracy_solves_from_above():
    record = {"task": "classification", "best": {"test": {"accuracy": 0.985}}, "solved_at": 0.99}
    assert records.measured(record, "task_solved") == 0
    record["best"]["test"]["accuracy"] = 0.995
    assert records.measured(record, "task_solved") == 1


@pytest.mark.parametrize(
    ("cell", "updates", "published"), [("lstm", 250, 9.52e11), ("gru", 250, 9.51e11), ("skip", 7.6, 2.89e10)]
)
def test_flops_with_the_cnn_are_counted_as_published(cell, updates, published):
    rnn = Recurrent("lstm", "skip", 2048, 512, 2) if cell == "skip" else Recurrent(cell, "always", 2048, 512, 2)
    test = {"state_updates": updates, "inference_flops": metrics.inference_flops(rnn, updates, 250)}
    record = {"best": {"test": test}, "input_flops": cnn_flops("resnet50")}
    assert records.measured(record, "inference_flops_with_cnn") == pytest.approx(published, rel=2e-3)
    record["input_flops"] = cnn_flops("made by hand")
    assert records.measured(record, "inference_flops_with_cnn") is None


# verdicts


def verdict_cells(markdown: str) -> dict[str, dict[str, str]]:
    """The second table."""
    return cells(markdown.split("\n\n")[-2])


def test_the_verdicts_stand_below_the_table(planned):
    finish_row(planned, "LSTM", (0.90, 0.92, 0.94, 0.96), (784.0,) * 4, (3.829e7,) * 4)
    finish_row(planned, "Skip LSTM, λ = 1e-4", (0.97, 0.975), (300.0, 310.0), (1.4e7, 1.6e7))
    markdown, tex, numbers = publish(planned)
    judged, line = verdict_cells(markdown), numbers.set_index("model").loc["LSTM"]
    # Welch's by hand: variances 6.667e-4 / 4 and 2.025e-3 / 4, √(1.667e-4 + 5.063e-4) = 0.02594, 4.78 degrees of
    # freedom, where t is 2.035; half of the interval 0.0528
    assert judged["LSTM"]["Accuracy"] == "reproduced: +0.020 [-0.033, +0.073], margin 0.090"
    assert (line.accuracy_low, line.accuracy_high) == pytest.approx((0.02 - 0.0528, 0.02 + 0.0528), abs=5e-5)
    assert judged["LSTM"]["Accuracy (last epoch)"].startswith("differs (lower): -0.445 [")
    assert judged["LSTM"]["State updates"] == judged["GRU (p_skip = 0.5)"]["State updates (last epoch)"] == "fixed"
    skip = judged["Skip LSTM, λ = 1e-4"]["State updates"]
    assert skip.startswith("undecided: -74.38 [")
    assert skip.endswith("], margin 66.18")  # two published deviations
    assert judged["Skip GRU, λ = 1e-4"]["Accuracy"] == "undecided"
    assert set(judged["SA-GRU, λ = 1e-4 (not in the paper)"].values()) == {"–"}
    assert "Margin: Accuracy 0.01, State updates 5 % of the steps, or two published standard deviations" in markdown
    assert tex.count(r"\begin{table}") == 2


def test_a_difference_is_corrected_for_the_number_of_rows(planned):
    """p = 0.0256 (scipy: ttest_ind_from_stats(0.965, 0.00594, 4, 0.976, 0.003, 4, False)); of two, it doubles."""
    finish_row(planned, "Skip GRU, λ = 1e-4", (0.958, 0.963, 0.967, 0.972), (390.0,) * 4, (1.4e7,) * 4)
    alone = [one for one in planned if one.row.label == "Skip GRU, λ = 1e-4"]
    assert publish(alone)[2].accuracy_verdict.tolist() == ["differs (lower)"]
    finish_row(planned, "GRU", (0.95, 0.96, 0.97, 0.98), (784.0,) * 4, (2.87e7,) * 4)
    judged = publish(planned)[2].set_index("model").loc["Skip GRU, λ = 1e-4"]
    assert judged.accuracy_verdict == "undecided"
    assert judged.accuracy_p == pytest.approx(2 * 0.0256, abs=2e-4)


def test_other_data_are_compared_in_direction_only(tmp_path):
    """Ten classes of UCF-101 stand beside all of them without a verdict; the whole test list has one."""
    experiment, planned = experiments.load("ucf101"), moved(planned_runs("ucf101", "ucf101/paper"), tmp_path)
    whole = {"examples": {"train": 8000, "validation": 1537, "test": 3783}, "input_flops": 3.8e9, "steps": 250}
    results = {"accuracy": 0.6, "state_updates": 150.0, "inference_flops": 1e9}
    few, other = whole | {"examples": {"test": 212}}, whole | {"input_flops": 3e8}
    for label, facts in {"LSTM": few, "GRU": other, "Skip GRU, λ = 0": whole}.items():
        for one in planned:
            if one.row.label == label:
                finish(one, facts, **results)
    markdown = publish(planned, experiment)[0]
    judged = verdict_cells(markdown)
    assert judged["LSTM"]["Accuracy"] == judged["GRU"]["Accuracy"] == "lower, on other data"
    assert judged["Skip GRU, λ = 0"]["Accuracy"] == "differs (lower): -0.196 [-0.196, -0.196], margin 0.010"
    assert judged["LSTM"]["State updates"] == "fixed"
    assert "other data than the paper's" in markdown
    assert "of the training list, two of its 18 groups are the validation set" in markdown
    alone = [one for one in planned if one.row.label == "Skip GRU, λ = 0"]
    assert "other data" not in publish(alone, experiment)[0]


def test_without_published_numbers_there_is_no_verdict(tmp_path):
    experiment = experiments.load("digits")
    planned = plan.runs(experiment, [["profile=digits/smoke", "seed=0", f"output={tmp_path}"]], compose)
    assert "Verdict" not in publish(planned, experiment)[0]


# LaTeX


def test_the_latex_table_has_every_cell_and_no_bare_special_sign(planned):
    finish_row(planned, "LSTM", (0.90, 0.92), (784.0,) * 2, (3.829e7,) * 2)
    tex = publish(planned)[1]
    assert r"LSTM & 0.910 $\pm$ 0.014 & 784.00 $\pm$ 0.00 & 3.83e7 & 0.455 $\pm$ 0.007 & 392.00" in tex
    assert r"LSTM (p\_skip = 0.5) & -- & -- & --" in tex
    assert r"Skip LSTM, $\lambda$ = 1e-4 &" in tex
    assert r"\caption{Table I: sequential MNIST." in tex
    assert r"\label{tab:table1}" in tex
    assert not set("±λ–") & set(tex)
    assert tex.count("{") == tex.count("}")
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    columns = [line.count("&") for line in body.splitlines() if line.endswith(r"\\")]
    assert columns == [9] * 9  # ten columns, header and eight rows


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("p_skip = 50 %", r"p\_skip = 50 \%"),
        ("1 ± 2", r"1 $\pm$ 2"),
        ("λ", r"$\lambda$"),
        ("–", "--"),
        ("A & B #1, $5, {x}", r"A \& B \#1, \$5, \{x\}"),
        (r"a\b ~ ^", r"a\textbackslash{}b \textasciitilde{} \textasciicircum{}"),
        ("plain (text), 1e-4", "plain (text), 1e-4"),
    ],
)
def test_signs_that_latex_reads_otherwise_are_escaped(text, escaped):
    assert table._latex(text) == escaped


# the command


def test_the_command_prints_and_writes_the_table(planned, tmp_path, capsys):
    finish_row(planned, "LSTM", (0.90,), (784.0,), (3.829e7,))
    target = tmp_path / "published"
    command = ["experiment=table1", "profile=mnist/paper", "rows=[1,4]", "seed=0", f"output={tmp_path}"]
    tables.main([*command, f"publish={target}"])
    printed = capsys.readouterr().out
    assert cells(printed)["LSTM"]["Runs"] == "1 / 1"
    assert cells(printed)["GRU"]["Runs"] == "0 / 1"
    assert f"written to {target}/" in printed
    assert {file.name for file in target.iterdir()} == {"table.md", "table.csv", "table.tex", "records"}
    assert printed.startswith((target / "table.md").read_text())
    assert f"Made by `python -m skiprnn.tables {shlex.join([*command[:4], f'publish={target}'])}`." in printed
    copied = sorted(file.relative_to(target / "records").as_posix() for file in target.rglob("*.json"))
    assert copied == [f"{planned[0].run.name}.json"]
    record = json.loads((target / "records" / copied[0]).read_text())
    assert record["best"]["test"]["state_updates"] == 784.0
    drawn, train = next_steps(printed)
    figures.main(drawn[1:])
    assert f"1 of 2 runs are complete; figures in {target}/figures/" in capsys.readouterr().out
    assert train == ["train", "-m", *command]


def test_what_comes_next_is_to_train_what_is_missing(planned, tmp_path, capsys):
    command = ["experiment=table1", "profile=mnist/paper", "rows=[1]", "seed=range(0, 1)", f"output={tmp_path}"]
    tables.main(command)
    assert next_steps(capsys.readouterr().out) == [["train", "-m", *command]]
    finish(planned[0], accuracy=0.9, state_updates=784.0, inference_flops=3.8e7)
    tables.main(command)
    assert next_steps(capsys.readouterr().out) == [["figures", *command]]


def test_a_damaged_record_is_told_and_the_table_is_made_without_it(planned, tmp_path, capsys):
    finish_row(planned, "LSTM", (0.90, 0.92), (784.0,) * 2, (3.829e7,) * 2)
    planned[0].folder.record_file.write_text("{}")
    with pytest.raises(SystemExit, match=rf"error: {planned[0].folder.record_file} is damaged; delete it"):
        tables.main(["experiment=table1", "profile=mnist/paper", f"output={tmp_path}"])
    assert cells(capsys.readouterr().out)["LSTM"]["Runs"] == "1 / 4"


def test_what_was_published_elsewhere_counts_as_complete(planned, tmp_path):
    """One machine publishes a seed of each of two rows; another has a third run, and continues the table."""
    here, there = tmp_path, tmp_path / "elsewhere"
    command = ["experiment=table1", "profile=mnist/paper", "rows=[1,4]", f"publish={tmp_path / 'published'}"]
    finish_row(planned, "LSTM", (0.90,), (784.0,), (3.829e7,))
    finish_row(planned, "GRU", (0.95,), (784.0,), (2.8e7,))
    diverge(planned[2])
    (planned[0].folder.path / "metrics.csv").write_text("epoch,validation/accuracy,seconds\n0,0.90,1\n")
    tables.main([*command, f"output={here}"])
    elsewhere = moved(planned, there)
    finish(elsewhere[1], accuracy=0.92, state_updates=784.0, inference_flops=3.829e7)  # the LSTM's second seed
    gru = next(one.folder for one in elsewhere if one.row.label == "GRU")
    begun = [gru.last, gru.best, gru.path / "metrics.csv"]
    gru.path.mkdir(parents=True)
    for file in begun:
        file.write_text("of an attempt that was stopped")
    tables.main([*command, f"output={there}"])
    shown = cells((tmp_path / "published" / "table.md").read_text())
    assert (shown["LSTM"]["Accuracy"], shown["LSTM"]["Runs"]) == ("0.910 ± 0.014", "3 / 4, 1 diverged")
    assert shown["GRU"]["Runs"] == "1 / 4"
    assert elsewhere[0].folder.complete, "the sweep would repeat it"
    assert elsewhere[0].folder.record() == planned[0].folder.record()
    dashboard.main([str(there)])  # knows them
    assert [one.folder.path.joinpath("metrics.csv").exists() for one in elsewhere[:2]] == [True, False]
    assert "0,0.90" in (elsewhere[0].folder.path / "metrics.csv").read_text(), "its curves would lack it"
    assert gru.complete
    assert not any(file.exists() for file in begun), "the attempt would pass for what was published"
    (aside,) = gru.path.glob("begun_*")
    assert {file.name: file.read_text() for file in aside.iterdir()} == dict.fromkeys(
        ("last.ckpt", "best.ckpt", "metrics.csv"), "of an attempt that was stopped"
    ), "published results must not cost anybody a checkpoint"
    assert len(list((tmp_path / "published").rglob("*.json"))) == 4


def test_a_diverged_run_is_published_and_taken_over_and_gives_way_to_a_result(planned, tmp_path):
    there = moved(planned, tmp_path / "there")
    published = tmp_path / "published"
    for one in planned[:2]:
        diverge(one)
    records.exchange(planned, published)
    record = json.loads((published / f"{planned[0].run.name}.json").read_text())
    assert (record["config"], record["hash"]) == (planned[0].run.identity, planned[0].run.hash)
    begun = there[0].folder
    begun.path.mkdir(parents=True)
    begun.last.write_text("this machine's attempt")
    records.exchange(there, published)
    assert [one.folder.diverged for one in there[:3]] == [False, True, False]
    assert begun.last.exists(), "it goes on, and may end otherwise"
    finish(there[0], accuracy=0.9, state_updates=784.0, inference_flops=1e6)
    records.exchange(there, published)
    records.exchange(planned, published)
    assert planned[0].folder.complete
    assert not planned[0].folder.diverged


MEASURED = {"accuracy": 1.0, "state_updates": 1.0, "inference_flops": 1.0}
RESULTS = {key: {"validation": MEASURED, "test": MEASURED} for key in ("best", "final")}
RESULTS |= {"steps": 784, "solved_at": None, "input_flops": 0.0}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {"seed": 7}}', RESULTS, {"error": "nan"}])
def test_a_damaged_published_record_or_another_runs_is_refused(planned, tmp_path, content):
    published = tmp_path / "published"
    file = published / "records" / f"{planned[0].run.name}.json"
    file.parent.mkdir(parents=True)
    another = json.dumps({"config": planned[1].run.identity} | content) if isinstance(content, dict) else None
    file.write_text(another or content)
    command = ["experiment=table1", "profile=mnist/paper", "rows=[1]", f"output={tmp_path}", f"publish={published}"]
    reason = "the record of another run" if another else "damaged"
    with pytest.raises(SystemExit, match=rf"error: .*\.json is {reason}; delete it"):
        tables.main(command)
    assert not planned[0].folder.complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile=digits/cpu"], "error: output=outputs: none of the 1 runs is complete; .*experiment=NAME"),
        (["profile=mnist/cpu"], "error: profile=mnist/cpu is not for data=digits: add experiment=NAME or data=mnist"),
        (["experiment=table9"], "error: experiment=table9: there are .*table1"),
        (["experiment=table1", "profile=mnist/paper", "nonsense=1"], "error: .*nonsense"),
        (["experiment=table1", "profile=mnist/weekend"], "error: .*profile/mnist/weekend"),
        (["experiment=table1", "profile=mnist/paper", "training.epochs=many"], r"error: training\.epochs: .*many"),
        (["experiment=table1", "profile=mnist/paper", "training.epochs="], r"error: "),
        (["experiment=table1", "profile=mnist/paper", "a=[1"], r"error: "),
    ],
)
def test_bad_input_gets_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        tables.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_published_table_is_what_its_records_say(file, tmp_path, monkeypatch):
    """The command that it names makes it anew."""
    (command,) = re.findall(r"Made by `python -m skiprnn\.tables (.*)`\.", file.read_text())
    here = tmp_path / "results" / file.parent.name
    shutil.copytree(file.parent / "records", here / "records")
    monkeypatch.chdir(tmp_path)
    tables.main(shlex.split(command))
    for made in here.glob("table.*"):
        assert made.read_text() == file.with_name(made.name).read_text(), command


@pytest.mark.parametrize("name", ["adding", "adding500", "frequency", "ucf101"])
def test_a_smoke_test_of_every_row_ends_in_the_table(name, tmp_path):
    """From the plan to the table, with smaller models; IMDb's rows differ from the others only in what they read."""
    make_small_ucf101(tmp_path)
    data = experiments.load(name).data
    overrides = [f"experiment={name}", f"data={data}", f"profile={data}/smoke", "model.hidden_size=4", "device=cpu"]
    overrides += ["training.evaluation_batches=1", f"output={tmp_path}", f"data_root={tmp_path}", "threads=1"]
    experiment, planned, _ = plan.requested(overrides)
    for one in planned:
        trained(one.run)
    markdown, _, numbers = publish(planned, experiment)
    assert list(numbers.model) == [row.label for row in experiment.rows]
    assert set(numbers.runs_done) == {1}
    measured = [f"{metric}_mean" for metric in experiment.columns if metric != "inference_flops_with_cnn"]
    assert not numbers[measured].isna().any(axis=None)
    note = "2 of 101 classes, 50 clips, features by random" if name == "ucf101" else "300 new batches an epoch"
    assert f"Data: {note}." in markdown


def test_what_a_grid_varies_makes_rows_of_its_own(tmp_path):
    experiment = experiments.load("digits")
    grid = [
        [f"output={tmp_path}", "profile=digits/smoke", seed, rate]
        for seed in ("seed=0", "seed=1")
        for rate in ("training.learning_rate=1e-3", "training.learning_rate=1e-2")
    ]
    planned = plan.runs(experiment, grid, compose)
    lines = statistics.rows(experiment, planned)
    assert len(lines) == 2 * len(experiment.rows)
    assert list(lines["model"][:2]) == ["LSTM, training.learning_rate=1e-3", "LSTM, training.learning_rate=1e-2"]
    assert set(lines["runs_planned"]) == {2}

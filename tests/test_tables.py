"""Tables from made-up records whose means are known."""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import compose, make_small_ucf101, trained
from scipy.stats import ttest_ind
from test_experiments import TABLE_1, plan

from skiprnn import Recurrent, tables
from skiprnn.data.ucf101 import cnn_flops
from skiprnn.papers import experiments
from skiprnn.papers.experiments import Experiment, PlannedRun, Row
from skiprnn.training import measures as metrics
from skiprnn.training.job import make_data


@pytest.fixture
def planned(tmp_path):
    """Table I's runs under the published protocol, four seeds a row, in a temporary folder."""
    return [
        dataclasses.replace(one, run=dataclasses.replace(one.run, output=str(tmp_path)))
        for one in plan("table1", "mnist/paper")
    ]


def finish(one: PlannedRun, facts: dict | None = None, **test: float) -> None:
    """Write the record of a complete run; only the test set of the best epoch must be read."""
    wrong = dict.fromkeys(test, 123.0)
    one.folder.path.mkdir(parents=True)
    results = {"best": {"epoch": 1, "test": test, "validation": wrong}, "final": {"epoch": 2, "test": wrong}}
    one.folder.finish({"config": one.run.identity} | results | (facts or {}))


def finish_row(planned: list[PlannedRun], label: str, accuracies=(), updates=(), flops=()) -> None:
    """Complete the first runs of a row."""
    runs = [one for one in planned if one.row.label == label]
    assert len(runs) == 4
    for one, a, u, f in zip(runs, accuracies, updates, flops, strict=False):
        finish(one, accuracy=a, state_updates=u, inference_flops=f)


def publish(planned: list[PlannedRun], experiment: Experiment | None = None) -> tuple[str, str, pd.DataFrame]:
    """The Markdown, LaTeX and CSV that are written."""
    experiment = experiment or experiments.load("table1")
    tables.publish(experiment, planned)
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
    table = cells(markdown)
    assert list(table) == list(TABLE_1)
    assert table["LSTM"] == {
        "Accuracy": "0.930 ± 0.026",  # √(20e-4 / 3) = 0.0258; the population's would be 0.022
        "State updates": "784.00 ± 0.00",
        "Inference FLOPs": "3.83e7",
        "Accuracy (paper)": "0.910 ± 0.045",
        "State updates (paper)": "784.00 ± 0.00",
        "Inference FLOPs (paper)": "3.83e7",
        "Runs": "4 / 4",
    }
    skip = table["Skip LSTM, λ = 1e-4"]
    assert (skip["Accuracy"], skip["State updates"], skip["Inference FLOPs"], skip["Runs"]) == (
        "0.970 ± 0.014",
        "305.00 ± 7.07",
        "1.50e7",
        "2 / 4",
    )
    single = table["GRU (p_skip = 0.5)"]  # one run has no spread
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
        table = cells(markdown)
        assert table["GRU"] == {
            "Accuracy": "–",
            "State updates": "–",
            "Inference FLOPs": "–",
            "Accuracy (paper)": "0.968 ± 0.013",
            "State updates (paper)": "784.00 ± 0.00",
            "Inference FLOPs (paper)": "2.87e7",
            "Runs": "0 / 4",
        }
        not_in_the_paper = table["SA-GRU, λ = 1e-4 (not in the paper)"]
        assert set(not_in_the_paper.values()) == {"–", "0 / 4"}


def test_failed_and_unfinished_runs_do_not_count(planned):
    first = planned[0]
    first.folder.path.mkdir(parents=True)
    first.folder.fail(RuntimeError("diverged"))
    first.folder.last.write_bytes(b"half-way")
    assert cells(publish(planned)[0])["LSTM"]["Runs"] == "0 / 4"


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
    planned = experiments.plan(experiment, [["profile=digits/smoke", "seed=0", f"output={tmp_path}"]], compose)
    finish(planned[0], mse=0.0012345, state_updates=50.0, inference_flops=2.46e6)
    line = cells(publish(planned, experiment)[0])["LSTM"]
    assert (line["MSE"], line["MSE (paper)"], line["State updates"]) == ("0.001234", "0.001670", "50.00")
    assert "Accuracy" not in line


def test_the_caption_states_the_protocol(planned):
    caption = tables.caption(experiments.load("table1"), planned)
    for part in (
        "Table I: sequential MNIST. The published protocol. 600 epochs, batch 256, Adam, learning rate 0.0001",
        "norm clipped at 1;",
        "best validation score; mean ± sample standard deviation",
        "Campos et al.",
    ):
        assert part in caption
    assert "λ = 0" not in caption
    overrides = ["training.epochs=7", "training.decay_epochs=2", "training.cost_free_epochs=3"]
    shortened = tables.caption(
        experiments.load("table1"),
        experiments.plan(experiments.load("table1"), [["experiment=table1", "profile=mnist/cpu", *overrides]], compose),
    )
    assert "instead of 600" in shortened
    assert "λ = 0 before epoch 4;" in shortened
    assert "learning rate 0.0005 (falling after epoch 5)," in shortened


def test_the_caption_tells_the_rows_of_each_protocol(tmp_path):
    same = [f"training.{setting}" for setting in ("learning_rate=5e-4", "cost_free_epochs=0", "decay_epochs=0")]
    overrides = ["experiment=table1", "profile=mnist/cpu", *same]
    grid = [[*overrides, f"training.epochs={epochs}", f"rows=[{rows}]"] for epochs, rows in [(16, "1,3"), (8, "4")]]
    experiment = experiments.load("table1")
    planned = [one for choice in grid for one in experiments.plan(experiment, [choice], compose)]
    caption = tables.caption(experiment, planned)
    assert "LSTM, Skip LSTM, λ = 1e-4: 16 epochs, batch 16, " in caption
    assert "clipped at 1; GRU: 8 epochs, batch 16, " in caption


def adding(tmp_path: Path, errors: dict[str, list[float]], updates: float = 25.0) -> tuple[Experiment, list]:
    """The adding task's table from runs with these squared errors, row by row."""
    experiment, planned = experiments.load("adding"), []
    for one in plan("adding", "adding/paper"):
        planned.append(dataclasses.replace(one, run=dataclasses.replace(one.run, output=str(tmp_path))))
    for label, values in errors.items():
        runs = [one for one in planned if one.row.label == label]
        for one, error in zip(runs, values, strict=False):
            facts = {"steps": 50, "solved_at": 1 / 600, "note": "drawn by hand"}
            finish(one, facts, mse=error, state_updates=updates, inference_flops=1e6)
    return experiment, planned


def test_a_task_is_solved_if_it_is_in_all_runs(tmp_path):
    errors = {
        "LSTM": [1e-4, 1.6e-3],
        "GRU": [1e-4, 1.7e-3],
        "LSTM (p_skip = 0.5)": [0.1, 0.05],
        "Skip GRU, λ = 0": [1e-9],
    }
    experiment, planned = adding(tmp_path, errors)
    markdown, _, numbers = publish(planned, experiment)
    column = {model: (line["Task solved"], line["Task solved (paper)"]) for model, line in cells(markdown).items()}
    assert column["LSTM"] == ("yes", "yes")
    assert column["GRU"] == ("50% of runs", "yes")
    assert column["LSTM (p_skip = 0.5)"] == ("no", "no")
    assert column["Skip GRU, λ = 1e-5"] == ("–", "yes")
    judged = numbers.set_index("model").task_solved_verdict
    assert judged["LSTM"] == judged["LSTM (p_skip = 0.5)"] == "agrees"
    assert judged["GRU"] == "worse"
    assert judged["Skip GRU, λ = 0"] == judged["Skip GRU, λ = 1e-5"] == "too few runs"
    assert "Solved: an MSE below 0.00167, for the verdict in all runs. Data: drawn by hand." in markdown
    assert cells(markdown)["LSTM"]["State updates (%)"] == "50.0 ± 0.0"  # 25 of 50


@pytest.mark.parametrize(
    ("data", "solved_at"), [("adding", 1 / 600), ("adding_sarnn", 1 / 600), ("frequency", 0.99), ("digits", None)]
)
def test_the_criterion_is_the_papers(data, solved_at):
    """A hundredth of the variance 1/6 of a sum of two values that are uniform on a unit interval; over 99 %."""
    run = experiments.configs.read(compose([f"data={data}"]))
    assert make_data(run).solved_at == pytest.approx(solved_at)


def test_the_last_epoch_stands_beside_the_best_and_is_compared_with_the_same_published_number(tmp_path):
    overrides = ["experiment=frequency", "profile=frequency/cpu", "rows=[4]", f"output={tmp_path}"]
    experiment, planned, _ = experiments.requested(overrides)
    facts = {"solved_at": 0.99, "steps": 100, "note": None}
    for one, final, updates in zip(planned, (0.995, 0.5), (12.3, 13.1), strict=True):
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
        "Task solved (last epoch)": "50% of runs",
        "State updates (last epoch)": "12.70 ± 0.57",
        "Task solved (paper)": "yes",
        "State updates (paper)": "12.70 ± 0.50",
        "Runs": "2 / 2",
    }
    judged = numbers.iloc[0]
    assert (judged.task_solved_verdict, judged.last_task_solved_verdict) == ("agrees", "worse")
    assert (judged.state_updates_verdict, judged.last_state_updates_verdict) == ("worse", "agrees")
    assert "best validation score and, since the paper names none, at the last one;" in markdown


def test_accuracy_solves_from_above():
    record = {"task": "classification", "best": {"test": {"accuracy": 0.985}}, "solved_at": 0.99}
    assert tables.measured(record, "task_solved") == 0
    record["best"]["test"]["accuracy"] = 0.995
    assert tables.measured(record, "task_solved") == 1


@pytest.mark.parametrize(
    ("cell", "updates", "published"), [("lstm", 250, 9.52e11), ("gru", 250, 9.51e11), ("skip", 7.6, 2.89e10)]
)
def test_flops_with_the_cnn_are_counted_as_published(cell, updates, published):
    rnn = Recurrent("lstm", "skip", 2048, 512, 2) if cell == "skip" else Recurrent(cell, "always", 2048, 512, 2)
    test = {"state_updates": updates, "inference_flops": metrics.inference_flops(rnn, updates, 250)}
    record = {"best": {"test": test}, "input_flops": cnn_flops("resnet50")}
    assert tables.measured(record, "inference_flops_with_cnn") == pytest.approx(published, rel=2e-3)
    record["input_flops"] = cnn_flops("made by hand")
    assert tables.measured(record, "inference_flops_with_cnn") is None


# verdicts


def test_the_interval_is_welchs():
    ours, theirs = [0.91, 0.94, 0.97], [0.955, 0.96, 0.97, 0.985]
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    spreads = [(pd.Series(values).mean(), pd.Series(values).std(), len(values)) for values in (ours, theirs)]
    result = tables.compare("accuracy", *spreads)
    assert (result["low"], result["high"]) == pytest.approx((expected.low, expected.high))
    assert result["verdict"] == "agrees"
    # by hand: variances 4/2 + 4/2, degrees of freedom 4² / (2² + 2²) = 2, where t is 4.3027
    result = tables.compare("state_updates", (30.0, 2.0, 2), (20.0, 2.0, 2))
    assert result["difference"] == 10
    assert (result["low"], result["high"]) == pytest.approx((10 - 8.6053, 10 + 8.6053), abs=1e-4)
    assert result["verdict"] == "worse"


@pytest.mark.parametrize(
    ("metric", "ours", "published", "verdict"),
    [
        ("accuracy", (0.99, 0.001, 4), (0.97, 0.001, 4), "better"),
        ("accuracy", (0.95, 0.001, 4), (0.97, 0.001, 4), "worse"),
        ("state_updates", (300.0, 1.0, 4), (379.38, 33.09, 4), "better"),
        ("state_updates", (784.0, 0.0, 2), (784.0, 0.0, 4), "agrees"),
        ("state_updates", (783.0, 0.0, 2), (784.0, 0.0, 4), "better"),
        ("accuracy", (0.9, None, 1), (0.9, 0.1, 4), "too few runs"),
        ("accuracy", (None, None, 0), (0.9, 0.1, 4), "too few runs"),
        # without a published deviation, by hand: 1 degree of freedom, where t is 12.706, times 0.01 / √2 = ± 0.0898
        ("accuracy", (0.881, 0.01, 2), (0.79, None, None), "better"),
        ("accuracy", (0.879, 0.01, 2), (0.79, None, None), "agrees"),
        # 98.02 would have been published as 98.0
        ("state_updates_percent", (98.02, 0.001, 4), (98.0, 0.0, 4), "agrees"),
        ("state_updates_percent", (98.12, 0.001, 4), (98.0, 0.0, 4), "worse"),
        ("task_solved", (0.5, None, 2), (True, None, None), "worse"),
        ("task_solved", (0.5, None, 2), (False, None, None), "agrees"),  # solved is what all runs solve
        ("task_solved", (1.0, None, 2), (False, None, None), "better"),
    ],
)
def test_verdicts(metric, ours, published, verdict):
    assert tables.compare(metric, ours, published)["verdict"] == verdict


def test_the_verdicts_stand_below_the_table(planned):
    finish_row(planned, "LSTM", (0.90, 0.92, 0.94, 0.96), (784.0,) * 4, (3.829e7,) * 4)
    markdown, tex, numbers = publish(planned)
    lines = [line for line in markdown.split("\n\n")[-2].splitlines() if line.startswith("| LSTM  ")]
    low, high = (numbers.set_index("model")[f"accuracy_{end}"]["LSTM"] for end in ("low", "high"))
    (accuracy, updates) = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    assert accuracy == f"+0.020 [{low:+.3f}, {high:+.3f}] agrees"
    assert updates == "+0.00 [+0.00, +0.00] agrees"
    assert markdown.count("too few runs") == 2 * 5
    assert tex.count(r"\begin{table}") == 2


def test_without_published_numbers_there_is_no_verdict(tmp_path):
    experiment = experiments.load("digits")
    planned = experiments.plan(experiment, [["profile=digits/smoke", "seed=0", f"output={tmp_path}"]], compose)
    assert "Verdict" not in publish(planned, experiment)[0]


# LaTeX


def test_the_latex_table_has_every_cell_and_no_bare_special_sign(planned):
    finish_row(planned, "LSTM", (0.90, 0.92), (784.0,) * 2, (3.829e7,) * 2)
    tex = publish(planned)[1]
    assert r"LSTM & 0.910 $\pm$ 0.014 & 784.00 $\pm$ 0.00 & 3.83e7 & 0.910 $\pm$ 0.045" in tex
    assert r"LSTM (p\_skip = 0.5) & -- & -- & --" in tex
    assert r"Skip LSTM, $\lambda$ = 1e-4 &" in tex
    assert r"\caption{Table I: sequential MNIST." in tex
    assert r"\label{tab:table1}" in tex
    assert not set("±λ–") & set(tex)
    assert tex.count("{") == tex.count("}")
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    columns = [line.count("&") for line in body.splitlines() if line.endswith(r"\\")]
    assert columns == [7] * 9  # eight columns, header and eight rows


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
    assert tables._latex(text) == escaped


# the command


def test_the_command_prints_and_writes_the_table(planned, tmp_path, capsys):
    finish_row(planned, "LSTM", (0.90,), (784.0,), (3.829e7,))
    target = tmp_path / "published"
    tables.main(["experiment=table1", "profile=mnist/paper", "seed=0", f"output={tmp_path}", f"publish={target}"])
    printed = capsys.readouterr().out
    assert cells(printed)["LSTM"]["Runs"] == "1 / 1"
    assert cells(printed)["GRU"]["Runs"] == "0 / 1"
    assert f"written to {target}/" in printed
    assert {file.name for file in target.iterdir()} == {"table.md", "table.csv", "table.tex", "records"}
    assert printed.startswith((target / "table.md").read_text())
    copied = sorted(file.relative_to(target / "records").as_posix() for file in target.rglob("*.json"))
    assert copied == [f"{planned[0].run.name}.json"]
    record = json.loads((target / "records" / copied[0]).read_text())
    assert record["best"]["test"]["state_updates"] == 784.0


def test_a_damaged_record_is_told_and_the_table_is_made_without_it(planned, tmp_path, capsys):
    finish_row(planned, "LSTM", (0.90, 0.92), (784.0,) * 2, (3.829e7,) * 2)
    planned[0].folder.record_file.write_text("{}")
    with pytest.raises(SystemExit, match=rf"error: {planned[0].folder.record_file} is damaged; delete it"):
        tables.main(["experiment=table1", "profile=mnist/paper", f"output={tmp_path}"])
    assert cells(capsys.readouterr().out)["LSTM"]["Runs"] == "1 / 4"


def test_what_was_published_elsewhere_counts_as_complete(planned, tmp_path):
    """One machine publishes a seed of each of two rows; another has a third run, and continues the table."""
    here, there = tmp_path, tmp_path / "elsewhere"
    command = ["experiment=table1", "profile=mnist/paper", f"publish={tmp_path / 'published'}"]
    finish_row(planned, "LSTM", (0.90,), (784.0,), (3.829e7,))
    finish_row(planned, "GRU", (0.95,), (784.0,), (2.8e7,))
    (planned[0].folder.path / "metrics.csv").write_text("epoch,validation/accuracy\n0,0.90\n")
    tables.main([*command, f"output={here}"])
    elsewhere = [dataclasses.replace(one, run=dataclasses.replace(one.run, output=str(there))) for one in planned]
    finish(elsewhere[1], accuracy=0.92, state_updates=784.0, inference_flops=3.829e7)  # the LSTM's second seed
    gru = next(one.folder for one in elsewhere if one.row.label == "GRU")
    begun = [gru.last, gru.best, gru.path / "metrics.csv"]
    gru.path.mkdir(parents=True)
    for file in begun:
        file.write_text("of an attempt that was stopped")
    tables.main([*command, f"output={there}"])
    table = cells((tmp_path / "published" / "table.md").read_text())
    assert (table["LSTM"]["Accuracy"], table["LSTM"]["Runs"]) == ("0.910 ± 0.014", "2 / 4")
    assert table["GRU"]["Runs"] == "1 / 4"
    assert elsewhere[0].folder.complete, "the sweep would repeat it"
    assert elsewhere[0].folder.record() == planned[0].folder.record()
    assert [one.folder.path.joinpath("metrics.csv").exists() for one in elsewhere[:2]] == [True, False]
    assert "0,0.90" in (elsewhere[0].folder.path / "metrics.csv").read_text(), "its curves would lack it"
    assert gru.complete
    assert not any(file.exists() for file in begun), "the attempt would pass for what was published"
    (aside,) = gru.path.glob("begun_*")
    assert {file.name: file.read_text() for file in aside.iterdir()} == dict.fromkeys(
        ("last.ckpt", "best.ckpt", "metrics.csv"), "of an attempt that was stopped"
    )
    assert len(list((tmp_path / "published").rglob("*.json"))) == 3


ANOTHERS = json.dumps({"config": {"seed": 7}} | {key: {"test": {"accuracy": 1.0}} for key in ("best", "final")})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", ANOTHERS])
def test_a_published_record_of_another_run_is_refused(planned, tmp_path, content):
    file = tmp_path / "published" / "records" / f"{planned[0].run.name}.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    command = ["experiment=table1", "profile=mnist/paper", f"output={tmp_path}", f"publish={tmp_path / 'published'}"]
    with pytest.raises(SystemExit, match=r"error: .*\.json is (damaged|the record of another run); delete it"):
        tables.main(command)
    assert not planned[0].folder.complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile=mnist/paper"], "error: experiment=NAME is missing"),
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


@pytest.mark.parametrize("name", ["adding", "adding500", "frequency", "ucf101"])
def test_a_smoke_test_of_every_row_ends_in_the_table(name, tmp_path):
    """From the plan to the table, with smaller models; IMDb's rows differ from the others only in what they read."""
    make_small_ucf101(tmp_path)
    data = experiments.load(name).data
    overrides = [f"experiment={name}", f"data={data}", f"profile={data}/smoke", "model.hidden_size=4", "device=cpu"]
    overrides += ["training.evaluation_batches=1", f"output={tmp_path}", f"data_root={tmp_path}", "threads=1"]
    experiment, planned, _ = experiments.requested(overrides)
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
    planned = experiments.plan(experiment, grid, compose)
    table = tables.rows(experiment, planned)
    assert len(table) == 2 * len(experiment.rows)
    assert list(table["model"][:2]) == ["LSTM, training.learning_rate=1e-3", "LSTM, training.learning_rate=1e-2"]
    assert set(table["runs_planned"]) == {2}

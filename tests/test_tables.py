"""Tables from made-up records whose means are known, and the plans that every experiment makes."""

import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import hydra
import pandas as pd
import pytest
from conftest import compose
from omegaconf import OmegaConf

from skiprnn import experiments, tables
from skiprnn.config import ConfigError
from skiprnn.experiments import Experiment, PlannedRun, Row, _last_wins

CONF = Path(__file__).resolve().parent.parent / "conf"
EXPERIMENTS = sorted(file.stem for file in experiments.FOLDER.glob("*.yaml"))
PROFILES = sorted(
    file.relative_to(CONF / "profile").with_suffix("").as_posix() for file in CONF.glob("profile/*/*.yaml")
)

# label: cell, policy, p_skip, λ, and of the paper's table accuracy, state updates (mean, std each) and FLOPs
TABLE_1 = {
    "LSTM": ("lstm", "always", None, 0, [0.910, 0.045], [784.00, 0.00], 3.83e7),
    "LSTM (p_skip = 0.5)": ("lstm", "random_steps", 0.5, 0, [0.893, 0.003], [392.03, 0.05], 1.91e7),
    "Skip LSTM, λ = 1e-4": ("lstm", "skip", None, 1e-4, [0.973, 0.002], [379.38, 33.09], 1.86e7),
    "GRU": ("gru", "always", None, 0, [0.968, 0.013], [784.00, 0.00], 2.87e7),
    "GRU (p_skip = 0.5)": ("gru", "random_steps", 0.5, 0, [0.912, 0.004], [391.86, 0.14], 1.44e7),
    "Skip GRU, λ = 1e-4": ("gru", "skip", None, 1e-4, [0.976, 0.003], [392.62, 26.48], 1.44e7),
    "SA-LSTM, λ = 1e-4 (not in the paper)": ("lstm", "selective", None, 1e-4, None, None, None),
    "SA-GRU, λ = 1e-4 (not in the paper)": ("gru", "selective", None, 1e-4, None, None, None),
}


def plan_of(experiment: Experiment, grid: list[list[str]]) -> list[PlannedRun]:
    """The runs of rows × grid, by Hydra's composition."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return experiments.plan(experiment, grid, lambda overrides: hydra.compose("config", list(overrides)))


@cache
def plan(experiment: str, profile: str) -> list[PlannedRun]:
    return plan_of(experiments.load(experiment), [[f"experiment={experiment}", f"profile={profile}"]])


@pytest.fixture
def planned(tmp_path):
    """Table I's runs under the published protocol, four seeds a row, in a temporary folder."""
    return [
        dataclasses.replace(one, run=dataclasses.replace(one.run, output=str(tmp_path)))
        for one in plan("table1", "mnist/paper")
    ]


def finish(one: PlannedRun, **test: float) -> None:
    """Write the record of a complete run; only the test set of the best epoch must be read."""
    wrong = dict.fromkeys(test, 123.0)
    one.folder.path.mkdir(parents=True)
    one.folder.finish({"best": {"epoch": 1, "test": test, "validation": wrong}, "final": {"epoch": 2, "test": wrong}})


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
    """A Markdown table as {model: {column: text}}."""
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]
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
    experiment = Experiment("adding_test", "Adding", "hand-made", (row,))
    planned = plan_of(experiment, [["profile=digits/smoke", "seed=0", f"output={tmp_path}"]])
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
    shortened = tables.caption(experiments.load("table1"), plan("table1", "mnist/cpu"))
    assert "epochs instead of 600" in shortened
    assert "λ = 0 in the first 2 epochs;" in shortened


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


# plans


def test_unknown_experiment_is_named():
    with pytest.raises(ConfigError, match="experiment=table9: there are digits, table1"):
        experiments.load("table9")


def test_rows_of_takes_the_rows_and_leaves_the_published_numbers():
    digits, table1 = experiments.load("digits"), experiments.load("table1")
    assert [row.label for row in digits.rows] == [row.label for row in table1.rows] == list(TABLE_1)
    for mine, theirs in zip(digits.rows, table1.rows, strict=True):
        assert mine.published == {}
        assert mine.overrides[0] == "data=digits"
        assert theirs.overrides[0] == "data=mnist"
        assert mine.overrides[1:] == theirs.overrides[1:]


def data_of(name: str) -> str:
    """The data set of all rows of an experiment."""
    chosen = {
        o.removeprefix("data=") for row in experiments.load(name).rows for o in row.overrides if o.startswith("data=")
    }
    assert len(chosen) == 1
    return chosen.pop()


FITTING = [(name, profile) for name in EXPERIMENTS for profile in PROFILES if profile.split("/")[0] == data_of(name)]


def test_every_experiment_has_a_profile():
    assert {name for name, _ in FITTING} == set(EXPERIMENTS) >= {"table1", "digits"}


@pytest.mark.parametrize(("name", "profile"), FITTING)
def test_every_row_composes_with_every_profile_that_fits(name, profile):
    experiment, planned = experiments.load(name), plan(name, profile)
    protocol = OmegaConf.load(CONF / "profile" / f"{profile}.yaml")
    rows = experiments.selected(experiment, protocol.get("rows"))
    assert [(one.row.label, one.run.seed) for one in planned] == [(r.label, s) for r in rows for s in protocol["seeds"]]
    assert {one.run.data["name"] for one in planned} == {data_of(name)}
    assert {one.run.experiment for one in planned} == {name}
    assert len({one.folder.path for one in planned}) == len(planned)
    if name in ("table1", "digits"):
        for one in planned:
            model = one.run.model
            assert (model.cell, model.policy, model.p_skip, model.cost_per_sample) == TABLE_1[one.row.label][:4]
            assert (model.hidden_size, model.num_layers) == (110, 1)


def test_the_paper_profile_is_the_published_protocol():
    runs = [one.run for one in plan("table1", "mnist/paper")]
    assert [run.seed for run in runs] == [0, 1, 2, 3] * 8
    for run in runs:
        assert dataclasses.asdict(run.training) == {
            "epochs": 600,
            "batch_size": 256,
            "learning_rate": 1e-4,
            "gradient_clip": 1.0,
            "cost_free_epochs": 0,
            "train_batches": None,
            "evaluation_batches": None,
        }


SKIP_ROW = Experiment("x", "", "", (Row("Skip", ("data=mnist", "model=skip_lstm", "model.cost_per_sample=1e-4")),))


def test_a_grid_multiplies_rows_and_names_its_own_seeds():
    grid = [
        ["profile=mnist/paper", f"seed={seed}", f"model.cost_per_sample={cost}"]
        for cost in (0, 1e-3)
        for seed in (5, 6)
    ]
    runs = [one.run for one in plan_of(SKIP_ROW, grid)]
    assert [(run.seed, run.model.cost_per_sample) for run in runs] == [(5, 0), (6, 0), (5, 1e-3), (6, 1e-3)]
    assert len({run.name for run in runs}) == 4


def test_what_the_user_says_wins_over_the_row():
    overridden = ["profile=digits/smoke", "data=digits", "model.cost_per_sample=0"]
    (one,) = plan_of(SKIP_ROW, [overridden])
    assert one.run.data["name"] == "digits"
    assert one.run.model.cost_per_sample == 0
    assert one.overrides == (
        "data=digits",
        "model=skip_lstm",
        "model.cost_per_sample=0",
        "profile=digits/smoke",
        "seed=0",
    )


def test_last_wins_keeps_one_override_per_key():
    assert _last_wins([]) == []
    assert _last_wins(["a=1", "b=2", "a=3"]) == ["a=3", "b=2"]
    assert _last_wins(["a=x=1", "a=x=2", "a.b=1"]) == ["a=x=2", "a.b=1"]  # the key ends at the first =
    assert _last_wins(["model=lstm", "model.p_skip=0.1"]) == ["model=lstm", "model.p_skip=0.1"]


def test_a_run_that_is_asked_for_twice_is_refused():
    with pytest.raises(ConfigError, match=r"the same run twice: mnist/skip_lstm_lambda0\.0001/seed0_"):
        plan_of(SKIP_ROW, [["profile=mnist/smoke", "seed=0"]] * 2)
    with pytest.raises(ConfigError, match="the same run twice"):  # as numbers they are one
        plan_of(SKIP_ROW, [["profile=mnist/smoke", f"model.cost_per_sample={cost}"] for cost in ("1e-4", "0.0001")])


def test_a_sweep_without_runs_is_refused():
    with pytest.raises(ConfigError, match="no runs"):
        plan_of(SKIP_ROW, [])


def test_what_a_grid_varies_makes_rows_of_its_own(tmp_path):
    experiment = experiments.load("digits")
    grid = [
        [f"output={tmp_path}", "profile=digits/smoke", seed, rate]
        for seed in ("seed=0", "seed=1")
        for rate in ("training.learning_rate=1e-3", "training.learning_rate=1e-2")
    ]
    planned = experiments.plan(experiment, grid, compose)
    table = tables.rows(planned)
    assert len(table) == 2 * len(experiment.rows)
    assert list(table["model"][:2]) == ["LSTM, training.learning_rate=1e-3", "LSTM, training.learning_rate=1e-2"]
    assert set(table["runs_planned"]) == {2}


def test_rows_are_chosen_by_number(tmp_path):
    experiment = experiments.load("table1")
    planned = experiments.plan(experiment, [["profile=mnist/cpu"]], compose)
    assert [one.row.label for one in planned] == [row.label for row in experiment.rows[:6]]
    planned = experiments.plan(experiment, [["profile=mnist/cpu", "rows=[8,1]"]], compose)
    assert [one.row.label for one in planned] == [experiment.rows[7].label, experiment.rows[0].label]
    with pytest.raises(ConfigError, match=r"rows=\[9\]: table1 has rows 1 to 8"):
        experiments.plan(experiment, [["rows=[9]"]], compose)

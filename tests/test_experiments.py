"""The plans that every experiment makes: rows × grid × seeds, against the papers' tables.

SKIPRNN_TABLES names a folder with the papers' tables as CSV; without it, published numbers are not compared with them.
"""

import csv
import dataclasses
import os
from functools import cache
from pathlib import Path

import pytest
from conftest import CONF, compose
from omegaconf import OmegaConf

from skiprnn.papers import experiments, plan
from skiprnn.papers.experiments import Experiment, Row
from skiprnn.papers.plan import PlannedRun, _last_wins
from skiprnn.training.config import ConfigError
from skiprnn.training.setup import make_data

PROFILE_FOLDER = Path(CONF, "profile")
EXPERIMENTS = sorted(experiments.files())
PROFILES = sorted(
    file.relative_to(PROFILE_FOLDER).with_suffix("").as_posix() for file in PROFILE_FOLDER.glob("*/*.yaml")
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


@cache
def planned_runs(experiment: str, profile: str) -> list[PlannedRun]:
    return plan.runs(experiments.load(experiment), [[f"experiment={experiment}", f"profile={profile}"]], compose)


def test_unknown_experiment_is_named():
    with pytest.raises(ConfigError, match=r"experiment=table9: there are .*digits.*table1"):
        experiments.load("table9")


# of the papers' tables: the file, and how the file names what the experiment calls otherwise
PAPERS = {
    "table1": "skiprnn_mnist.csv",
    "adding": "skiprnn_adding.csv",
    "adding500": "sarnn_adding.csv",
    "frequency": "skiprnn_frequency.csv",
    "imdb": "skiprnn_imdb.csv",
    "ucf101": "skiprnn_ucf101.csv",
}
POLICIES = {"Skip": "skip", "SA-RNN": "selective", "Random": "random_neurons"}


def test_every_table_is_there():
    assert {experiment.name for experiment in experiments.published()} == set(PAPERS)


@pytest.mark.skipif("SKIPRNN_TABLES" not in os.environ, reason="SKIPRNN_TABLES names no folder with the papers' tables")
@pytest.mark.parametrize(("name", "file"), PAPERS.items())
def test_rows_and_published_numbers_are_the_papers(name, file):
    """Row by row: cell, policy, p_skip, λ and length, and every published number."""
    with Path(os.environ["SKIPRNN_TABLES"], file).open(newline="") as table:
        expected = [{key: value for key, value in line.items() if value} for line in csv.DictReader(table)]
    planned = [one for one in planned_runs(name, f"{experiments.load(name).data}/paper") if one.run.seed == 0]
    planned = [one for one in planned if "not in the paper" not in one.row.label]
    assert len(planned) == len(expected)
    for one, line in zip(planned, expected, strict=True):
        model, given = one.run.model, one.row.published
        policy = POLICIES.get(line["model"].split()[0], "random_steps" if "p_skip" in line else "always")
        assert (model.cell, model.policy) == ("lstm" if "LSTM" in line["model"] else "gru", policy)
        assert model.p_skip == (float(line["p_skip"]) if "p_skip" in line else None)
        assert model.cost_per_sample == float(line.get("lambda", 0))
        if "sequence_length" in line:
            assert make_data(one.run).steps == int(line["sequence_length"])
        stated = {}
        for key, value in line.items():
            if key == "task_solved":
                stated[key] = value == "yes"
            elif key in ("accuracy", "state_updates"):
                stated[key] = float(value)
            elif key.endswith("_mean"):
                metric, mean, std = key.removesuffix("_mean"), float(value), line.get(key.replace("_mean", "_std"))
                if metric == "skip_percent":
                    metric, mean = "state_updates_percent", 100 - mean
                stated[metric] = [mean, float(std)] if std else mean
            elif key == "inference_flops":
                stated["inference_flops_with_cnn" if name == "ucf101" else key] = float(value)
            elif key == "flops_millions":
                stated["inference_flops"] = float(value) * 1e6
        assert given.keys() == stated.keys()
        for metric, value in stated.items():
            assert given[metric] == pytest.approx(value, rel=1e-12), (one.row.label, metric)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("adding", {"hidden_size": 110, "num_layers": 1, "dropout": 0}),
        ("adding500", {"hidden_size": 128, "num_layers": 1, "learn_initial_state": False}),
        ("frequency", {"hidden_size": 110, "num_layers": 1, "dropout": 0}),
        ("imdb", {"hidden_size": 128, "num_layers": 1, "embedding_size": 300, "dropout": 0.2}),
        ("ucf101", {"hidden_size": 512, "num_layers": 2, "dropout": 0}),
    ],
)
def test_models_have_the_published_sizes(name, sizes):
    for one in planned_runs(name, f"{experiments.load(name).data}/smoke"):
        assert dataclasses.asdict(one.run.model).items() >= sizes.items()


FITTING = [
    (name, profile)
    for name in EXPERIMENTS
    for profile in PROFILES
    if profile.split("/")[0] == experiments.load(name).data
]


def test_every_experiment_has_a_profile():
    assert {name for name, _ in FITTING} == set(EXPERIMENTS) >= {"table1", "digits"}
    tasks = {experiment.data for experiment in experiments.published()}
    assert set(PROFILES) >= {f"{data}/{profile}" for data in tasks for profile in ("paper", "cpu", "smoke")}


@pytest.mark.parametrize(("name", "profile"), FITTING)
def test_every_row_composes_with_every_profile_that_fits(name, profile):
    experiment, planned = experiments.load(name), planned_runs(name, profile)
    protocol = OmegaConf.load(PROFILE_FOLDER / f"{profile}.yaml")
    rows = plan.selected(experiment, protocol.get("rows"))
    assert [(one.row.label, one.run.seed) for one in planned] == [(r.label, s) for r in rows for s in protocol["seeds"]]
    assert {one.run.data["name"] for one in planned} == {experiment.data}
    assert {one.run.experiment for one in planned} == {name}
    assert len({one.folder.path for one in planned}) == len(planned)
    if name == "table1":
        for one in planned:
            model = one.run.model
            assert (model.cell, model.policy, model.p_skip, model.cost_per_sample) == TABLE_1[one.row.label][:4]
            assert (model.hidden_size, model.num_layers) == (110, 1)


def test_the_paper_profile_is_the_published_protocol():
    runs = [one.run for one in planned_runs("table1", "mnist/paper")]
    assert [run.seed for run in runs] == [0, 1, 2, 3] * 8
    for run in runs:
        assert dataclasses.asdict(run.training) == {
            "epochs": 600,
            "batch_size": 256,
            "learning_rate": 1e-4,
            "gradient_clip": 1.0,
            "cost_free_epochs": 0,
            "decay_epochs": 0,
            "warmup_epochs": 0,
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
    runs = [one.run for one in plan.runs(SKIP_ROW, grid, compose)]
    assert [(run.seed, run.model.cost_per_sample) for run in runs] == [(5, 0), (6, 0), (5, 1e-3), (6, 1e-3)]
    assert len({run.name for run in runs}) == 4


def test_what_the_user_says_wins_over_the_row():
    overridden = ["profile=digits/smoke", "data=digits", "model.cost_per_sample=0"]
    (one,) = plan.runs(SKIP_ROW, [overridden], compose)
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
        plan.runs(SKIP_ROW, [["profile=mnist/smoke", "seed=0"]] * 2, compose)
    with pytest.raises(ConfigError, match="the same run twice"):  # as numbers they are one
        plan.runs(
            SKIP_ROW, [["profile=mnist/smoke", f"model.cost_per_sample={cost}"] for cost in ("1e-4", "0.0001")], compose
        )


def test_a_sweep_without_runs_is_refused():
    with pytest.raises(ConfigError, match="no runs"):
        plan.runs(SKIP_ROW, [], compose)


def test_rows_are_chosen_by_number(tmp_path):
    experiment = experiments.load("table1")
    planned = plan.runs(experiment, [["profile=mnist/cpu"]], compose)
    assert [one.row.label for one in planned] == [row.label for row in experiment.rows[:6]]
    planned = plan.runs(experiment, [["profile=mnist/cpu", "rows=[8,1]"]], compose)
    assert [one.row.label for one in planned] == [experiment.rows[7].label, experiment.rows[0].label]
    with pytest.raises(ConfigError, match=r"rows=\[9\]: table1 has rows 1 to 8"):
        plan.runs(experiment, [["rows=[9]"]], compose)

"""Every config composes and trains one step; a run keeps its identity."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONF, compose, make_small_ucf101, trained
from omegaconf import OmegaConf

from skiprnn.data.base import DataError
from skiprnn.papers import experiments
from skiprnn.training import command_line, config
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, read_record
from skiprnn.training.module import SideBySide
from skiprnn.training.setup import make_data, make_module


def names(group: str) -> list[str]:
    return sorted(
        str(path.relative_to(Path(CONF) / group).with_suffix("")) for path in (Path(CONF) / group).rglob("*.yaml")
    )


def one_training_step(run: config.RunConfig) -> None:
    """A step on the first real batch changes the weights and leaves them finite."""
    module = make_module(replace(run, device="cpu"))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    inputs, targets, lengths = next(iter(module.data.training_batches(0)))
    module.begin("train", 0)
    SideBySide([module]).training_step([(inputs[:4], targets[:4], None if lengths is None else lengths[:4])])
    after = list(module.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in after)


@pytest.fixture(scope="session")
def data_or_skip(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")  # for all tests: reviews are tokenised once

    def check(overrides: list[str]) -> list[str]:
        run = command_line.read(compose(overrides))
        if run.data["name"] == "ucf101":
            make_small_ucf101(root)
        elif (
            run.data["name"] not in ("digits", "adding", "adding_sarnn", "frequency")
            and "SKIPRNN_MIRROR" not in os.environ
        ):
            pytest.skip(f"SKIPRNN_MIRROR names no folder with {run.data['name']}")
        return [*overrides, f"data_root={root}"]

    return check


@pytest.mark.parametrize("model", names("model"))
@pytest.mark.parametrize("data", ["digits", "adding"])
def test_every_model_trains_one_step(model, data):
    one_training_step(
        command_line.read(compose([f"model={model}", f"data={data}", "model.hidden_size=5", "model.num_layers=2"]))
    )


@pytest.mark.parametrize("data", names("data"))
def test_every_data_set_trains_one_step(data, data_or_skip):
    one_training_step(
        command_line.read(compose(data_or_skip([f"data={data}", "model.hidden_size=5", "training.batch_size=16"])))
    )


@pytest.mark.parametrize("profile", names("profile"))
def test_every_profile_composes(profile):
    assert compose([f"profile={profile}"])["seeds"]
    command_line.read(compose([f"profile={profile}"]))


@pytest.mark.parametrize(
    ("logger", "traces"), [("csv", "metrics.csv"), ("tensorboard", "*tfevents*"), ("wandb", "*.wandb")]
)
def test_every_logger_logs(logger, traces, small_run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = small_run(f"logger=[csv,{logger}]", "training.epochs=1")
    trained(run)
    assert list(RunFolder(run).path.rglob(traces))


ROWS = [(name, row) for name in experiments.files() for row in experiments.load(name).rows]


@pytest.mark.parametrize(("experiment", "row"), ROWS, ids=lambda value: getattr(value, "label", value))
def test_every_row_of_every_experiment_trains_one_step(experiment, row, data_or_skip):
    overrides = data_or_skip([*row.overrides, "training.batch_size=16", "model.hidden_size=5"])
    one_training_step(command_line.read(compose(overrides)))


RECORDS = sorted(Path(CONF).parent.glob("results/**/*.json"))


def test_every_published_record_still_has_its_hash_and_task():
    records = {file: json.loads(file.read_text()) for file in RECORDS}
    runs = {file: RunConfig.of(record["config"]) for file, record in records.items() if "config" in record}
    assert len(runs) > 200
    hashes = {record["name"]: (record["hash"], runs[file].hash) for file, record in records.items() if file in runs}
    assert [name for name, (published, now) in hashes.items() if now != published] == []
    tasks = {str(file): (read_record(file, run)["task"], make_data(run).task) for file, run in runs.items()}
    assert [file for file, (recorded, task) in tasks.items() if recorded != task] == []


def test_a_later_option_is_part_of_what_a_run_is_unless_it_stands_at_its_default():
    plain, warm = (command_line.read(compose([f"training.warmup_epochs={epochs}"])) for epochs in (0, 3))
    assert "warmup_epochs" not in plain.identity["training"]
    assert warm.identity["training"]["warmup_epochs"] == 3
    assert RunConfig.of(warm.identity) == RunConfig.of(warm.identity | {"seed": 0})


def test_a_retired_option_is_read_at_its_last_value_alone():
    run = command_line.read(compose([]))
    assert run.identity["model"]["layer_norm"] is False
    older = OmegaConf.create(run.identity)
    assert command_line.read(older).hash == RunConfig.of(run.identity).hash == run.hash
    older.model.layer_norm = True
    for reading in (command_line.read, RunConfig.of):
        with pytest.raises(ConfigError, match=r"model.layer_norm=True: there is no such option any more"):
            reading(older)


def test_missing_data_names_both_ways_out(tmp_path, monkeypatch, small_run):
    monkeypatch.setenv("SKIPRNN_MIRROR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [])
    with pytest.raises(DataError, match="connect to the internet, or set SKIPRNN_MIRROR"):
        trained(small_run("data=mnist", f"data_root={tmp_path}"))

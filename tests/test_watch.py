"""The files that an offline wandb run leaves for `wandb sync`: history, summary, pictures."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, compose, trained
from PIL import Image

from skiprnn.training import wandb_page as watch
from skiprnn.training.command_line import read as config_of
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import RunFolder
from skiprnn.training.keeper import RunKeeper
from skiprnn.views.samples import picture

BLOCK = 32768  # of a .wandb file, which is a LevelDB log


def read_log(path: Path) -> Iterator[bytes]:
    """The entries of a LevelDB log after wandb's header: chunks after 7 bytes of checksum, length and type."""
    content, position, entry = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        entry += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last
            yield entry
            entry = b""


def read_page(folder: Path) -> dict:
    """What an offline run's file holds: the run, its config, one dict per call of wandb.log, the last summary."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes the last block when it ends
    (file,) = folder.glob("*.wandb")
    page: dict = {"history": [], "summary": {}, "axes": {}, "artifacts": []}

    def values(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    for record in map(Record.FromString, read_log(file)):
        if record.HasField("run"):
            page |= {"run": record.run, "config": values(record.run.config.update)}
        page["history"] += [values(record.history.item)] if record.HasField("history") else []
        page["summary"] |= values(record.summary.update)
        page["axes"] |= {record.metric.name: record.metric.step_metric} if record.HasField("metric") else {}
        if record.HasField("request") and record.request.HasField("log_artifact"):
            page["artifacts"] += [record.request.log_artifact.artifact]
        page["artifacts"] += [record.artifact] if record.HasField("artifact") else []
    return page


@pytest.fixture
def wandb_run(small_run, tmp_path, monkeypatch):
    """A function: overrides -> a run that logs to wandb on a machine without a key."""
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return lambda *overrides: small_run("logger=[csv,wandb]", "model=skip_lstm", "training.epochs=2", *overrides)


def test_offline_page_holds_history_summary_and_pictures(wandb_run):
    run = wandb_run("model.cost_per_sample=1e-3", "seed=3")
    record = trained(run, picture)
    (folder,) = (RunFolder(run).path / "wandb").glob("offline-run-*")
    page = read_page(folder)
    described = page["run"]
    assert (described.run_id, described.project, described.job_type) == (run.hash, "skiprnn", "train")
    assert (described.display_name, described.run_group) == (run.name, "digits/skip_lstm_lambda0.001")
    assert {"digits", "lstm", "skip"} <= set(described.tags)
    assert {key: page["config"][key] for key in ("lambda", "p_skip", "seed")} == {
        "lambda": 1e-3,
        "p_skip": None,
        "seed": 3,
    }
    epochs = [row for row in page["history"] if "validation/accuracy" in row]
    assert [row["epoch"] for row in epochs] == [0, 1]
    assert epochs[-1]["validation/accuracy"] == record["final"]["validation"]["accuracy"]
    for key in ("accuracy", "state_updates", "inference_flops"):
        assert page["summary"][f"test/{key}"] == record["best"]["test"][key]
    assert page["summary"]["best_epoch"] == record["best"]["epoch"]
    first = f"{watch.Page.AGAINST}/accuracy"
    assert page["axes"][first] == "validation/state_updates"
    assert [row[first] for row in epochs] == [row["validation/accuracy"] for row in epochs]
    assert first == min(key for key in epochs[-1] if "/" in key), "sections are in the order of their names"
    (weights,) = page["artifacts"]
    assert (weights.type, weights.name) == ("model", f"skip_lstm_lambda0.001-{run.hash}")
    (entry,) = weights.manifest.contents
    assert (entry.path, entry.size) == ("best.ckpt", RunFolder(run).best.stat().st_size)
    pictures = [name for row in page["history"] for name in row.get("usage/filenames", [])]
    assert len(pictures) == 2
    last = Image.open(folder / "files" / pictures[-1])
    assert last.tobytes() == Image.open(RunFolder(run).path / "usage.png").tobytes()


def test_unreachable_server_means_offline_and_no_question(wandb_run, monkeypatch, capsys):
    import wandb

    def login(prompt):
        assert not prompt
        raise wandb.errors.AuthenticationError("no such host\nand more")

    monkeypatch.setattr(wandb, "login", login)
    assert watch.page_options(wandb_run())["mode"] == "offline"
    assert "wandb: no such host; logging offline" in capsys.readouterr().err


def test_a_page_per_run_and_one_for_a_resumed_run(wandb_run, monkeypatch):
    run, other = wandb_run(), wandb_run("seed=1")

    def stop(*arguments):
        raise ConfigError("stopped after an epoch")

    with monkeypatch.context() as patched:
        patched.setattr(RunKeeper, "_tell", stop)
        with pytest.raises(ConfigError, match="stopped after an epoch"):
            trained(run)
    for one in (run, other):
        trained(one)
    folders = [sorted((RunFolder(one).path / "wandb").glob("offline-run-*")) for one in (run, other)]
    assert [len(one) for one in folders] == [2, 1]
    first, continued, another = (read_page(folder) for folder in itertools.chain(*folders))
    assert first["run"].run_id == continued["run"].run_id == run.hash
    assert another["run"].run_id == other.hash
    epochs = [[row["epoch"] for row in page["history"] if "epoch" in row] for page in (first, continued, another)]
    assert epochs == [[0], [1], [0, 1]]


def test_wandbs_agent_can_search_for_a_cost(wandb_run, monkeypatch, tmp_path):
    """The file for `wandb sweep`, by the agent's own words for the command, and the page that the agent asks for."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = yaml.safe_load((Path(__file__).parents[1] / "examples" / "wandb_sweep.yaml").read_text())
    chosen = {"model": "skip_lstm", "model.cost_per_sample": 0.01, "seed": 2}
    assert chosen.keys() == config["parameters"].keys()
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words = create_sweep_command(config["command"])
    words = [word.replace("${program}", config["program"]) for word in words if word != "${env}"]
    place = words.index("${args_no_hyphens}")
    words[place : place + 1] = arguments["args_no_hyphens"]
    start = words.index(config["program"])
    assert words[start - 2 : start] == ["python", "-m"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "agents01")
    short = [
        *SMALL,
        "training.epochs=1",
        "training.decay_epochs=0",
        "training.cost_free_epochs=0",
        "training.warmup_epochs=0",
    ]
    run = config_of(compose([*words[start + 1 :], *short, f"output={tmp_path}"]))
    assert (run.model.cost_per_sample, run.seed) == (0.01, 2)
    trained(run)
    (folder,) = (RunFolder(run).path / "wandb").glob("offline-run-*")
    described = read_page(folder)["run"]
    assert (described.run_id, described.sweep_id) == ("agents01", "sweep123")

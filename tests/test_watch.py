"""The files that an offline wandb run leaves for `wandb sync`: history, summary, pictures."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import trained
from PIL import Image

from skiprnn.training import wandb_page as watch
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
    page: dict = {"history": [], "summary": {}}

    def values(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    for record in map(Record.FromString, read_log(file)):
        if record.HasField("run"):
            page |= {"run": record.run, "config": values(record.run.config.update)}
        page["history"] += [values(record.history.item)] if record.HasField("history") else []
        page["summary"] |= values(record.summary.update)
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

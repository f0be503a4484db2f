"""Checkpoints measured again give their record; published ones load into the public classes, and errors say why."""

import json
import re

import pytest
import torch
from conftest import SMALL, next_steps, trained
from safetensors.torch import load_file, save_file

import skiprnn
from skiprnn import dashboard, evaluate, publish, tables
from skiprnn.model import pretrained
from skiprnn.papers import release
from skiprnn.training import folder as runs
from skiprnn.training.config import ConfigError

CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "random_skip_lstm": "RandomSkipLSTM",
    "random_skip_gru": "RandomSkipGRU",
    "skip_lstm": "SkipLSTM",
    "skip_gru": "SkipGRU",
    "sa_lstm": "SALSTM",
    "sa_gru": "SAGRU",
    "random_neurons_gru": "Recurrent",  # has no class of its own
}


@pytest.fixture
def published(small_run, tmp_path):
    """A function: overrides -> the folder of a run of one step, and its published checkpoint."""

    def make(*overrides: str):
        run = small_run("training.epochs=1", "+training.train_batches=1", *overrides)
        trained(run)
        folder = runs.RunFolder(run)
        return folder, release.export(folder, tmp_path / "published")

    return make


# evaluate


@pytest.mark.parametrize("model", ["random_skip_gru", "sa_lstm"])
def test_the_recorded_numbers_come_out_again(model, published):
    folder, file = published(f"model={model}", "training.epochs=2", "+training.evaluation_batches=1")
    expected = folder.record()["best"]["test"]
    for path in (folder.best, file):
        found = evaluate.evaluate(evaluate.load(path, device="cpu"), batches=1)
        assert found == pytest.approx(expected, rel=1e-6)


def test_without_skipping_is_the_plain_network_with_the_same_weights(published):
    folder, _ = published("model=skip_gru", "model.num_layers=2")
    module = evaluate.load(folder.best, device="cpu")
    with torch.no_grad():
        module.network.rnn.policy.bias.fill_(-2.0)  # skips
    plain = skiprnn.GRU(1, 6, num_layers=2, batch_first=True)
    plain.layers.load_state_dict(module.network.rnn.layers.state_dict())
    x = torch.rand(3, 64, 1)
    prediction, updates = evaluate.without_skipping(module.network)(x)
    assert torch.equal(updates, torch.ones(3, 64))
    torch.testing.assert_close(prediction, module.network.readout(plain(x)[1][-1]))
    assert module.network(x)[1].mean() < 0.5, "the network itself was changed"


def test_the_command_prints_both_networks(published, capsys):
    folder, file = published("model=random_skip_lstm", "model.p_skip=0.75")
    evaluate.main([f"checkpoint={folder.best}", "device=cpu", "threads=1", "repetitions=1"])
    printed = capsys.readouterr().out
    assert "test set, 300 sequences" in printed
    trained, plain, ratio = re.search(r"state updates +│ ([\d.]+) +│ ([\d.]+) +│ ([\d.]+)", printed).groups()
    assert (float(trained), plain) == (pytest.approx(16, abs=0.5), "64.00")
    assert float(ratio) == pytest.approx(float(trained) / 64, abs=1e-3)
    for batch in (1, 256):
        assert re.search(rf"ms per sequence, batch {batch} +│ [\d.]+ +│ [\d.]+ +│ [\d.]+", printed)
    (step,) = next_steps(printed)
    assert step == ["dashboard", folder.run.output]
    dashboard.main(step[1:])
    evaluate.main([f"checkpoint={file}", "device=cpu", "threads=1", "repetitions=1"])
    (step,) = next_steps(capsys.readouterr().out)
    evaluate.main([*step[1:], "device=cpu"])
    printed = capsys.readouterr().out
    assert f"agrees  {file}" in printed
    assert next_steps(printed) == [["evaluate", f"checkpoint={file}"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint=FILE is missing"),
        (["checkpoint=none.ckpt", "verify=none"], "checkpoint=FILE is missing, or verify"),
        (["checkpoint=none.ckpt"], "checkpoint none.ckpt: there is no such file"),
        (["checkpoint=none.safetensors"], "checkpoint none.safetensors: there is no such file"),
        (["checkpoint=none.ckpt", "split=train"], "split=train: there are validation, test"),
        (["checkpoint=none.ckpt", "repetitions=0"], "repetitions=0: must be at least 1"),
        (["checkpoint=none.ckpt", "threads=many"], "threads=many|'many'"),
        (["checkpoint=none.ckpt", "colour=red"], "Key 'colour' not in"),
        (["checkpoint=[1"], "error: "),
        (["verify=none"], r"verify=none: no published checkpoint \(\*\.safetensors\) there"),
    ],
)
def test_bad_command_lines_get_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        evaluate.main(arguments)
    assert "\n" not in str(error.value)


def test_checkpoints_that_are_none_are_named(tmp_path):
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="corrupt or no checkpoint"):
        evaluate.load(tmp_path / "other.ckpt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match=r"was not written by skiprnn\.train"):
        evaluate.load(tmp_path / "foreign.ckpt")


def test_verify_compares_with_the_records(published, tmp_path, capsys):
    for overrides in (["model=skip_lstm"], ["model=gru"]):
        _, file = published(*overrides)
    evaluate.main([f"verify={tmp_path}/pub*", "device=cpu"])
    assert capsys.readouterr().out.count("agrees") == 2
    record, tensors = pretrained.read(file)
    record["best"]["test"]["accuracy"] += 0.01
    file.write_bytes(pretrained.serialise(record, tensors))
    with pytest.raises(SystemExit, match="error: 1 of 2 checkpoints differ from their records"):
        evaluate.main([f"verify={tmp_path}/pub*", "device=cpu"])
    assert f"DIFFERS {file}" in capsys.readouterr().out


def test_the_last_epoch_is_published_too_where_another_was_the_best(published, tmp_path, capsys):
    _, file = published("model=skip_lstm", "training.epochs=2", "training.learning_rate=1e-12")  # a tie: the first
    last = file.with_name(pretrained.LAST)
    assert f"1 of 2; `{last.name}` is the last" in file.with_name("README.md").read_text()
    (record, best), (again, tensors) = pretrained.read(file), pretrained.read(last)
    assert record == again
    assert any(not torch.equal(best[name], tensors[name]) for name in best)
    evaluate.main([f"verify={tmp_path}/pub*", "device=cpu"])
    assert capsys.readouterr().out.count("agrees") == 2
    record["final"]["test"]["accuracy"] += 0.01
    last.write_bytes(pretrained.serialise(record, tensors))
    with pytest.raises(SystemExit, match="error: 1 of 2 checkpoints differ from their records"):
        evaluate.main([f"verify={tmp_path}/pub*", "device=cpu"])
    assert f"DIFFERS {last}" in capsys.readouterr().out


# published checkpoints


@pytest.mark.parametrize(("model", "name"), CLASSES.items())
def test_a_published_network_computes_what_the_trained_one_did(model, name, published):
    few = "+training.evaluation_batches=1"
    folder, file = published(f"model={model}", "model.num_layers=2", "model.learn_initial_state=false", few)
    kind = getattr(skiprnn, name)
    rnn, network = kind.from_pretrained(file, batch_first=True), evaluate.load(folder.best, device="cpu").network
    assert type(rnn) is kind
    x = torch.rand(3, 64, 1)
    results = []
    for one in (rnn, network.rnn):
        torch.manual_seed(0)
        results.append(one(x))
    (output, state, updates), (expected, _, expected_updates) = results
    assert torch.equal(output, expected)
    assert torch.equal(updates, expected_updates)
    stored = load_file(file)  # as the model card says
    h = state[0] if name.endswith("LSTM") else state
    prediction = h[-1] @ stored["readout.weight"].T + stored["readout.bias"]
    torch.testing.assert_close(prediction, network.readout(h[-1]))


def test_options_are_the_constructors(published):
    _, file = published("model=skip_gru")
    rnn = skiprnn.SkipGRU.from_pretrained(str(file), batch_first=False, dtype=torch.float64, engine="reference")
    assert rnn(torch.rand(5, 2, 1, dtype=torch.float64))[0].shape == (5, 2, 6)
    assert type(skiprnn.Recurrent.from_pretrained(file)) is skiprnn.SkipGRU


def test_what_is_no_published_checkpoint_is_named(published, tmp_path):
    folder, file = published("model=skip_lstm")
    kind = skiprnn.SkipLSTM
    with pytest.raises(ValueError, match="none: there is no such file"):
        kind.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="corrupt or no safetensors file"):
        kind.from_pretrained(folder.best)
    with pytest.raises(ValueError, match=r"holds a SkipLSTM: load it with SkipLSTM\.from_pretrained"):
        skiprnn.SkipGRU.from_pretrained(file)
    record, tensors = pretrained.read(file)
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"was not written by skiprnn\.publish"):
        kind.from_pretrained(tmp_path / "foreign.safetensors")
    record["config"]["model"]["hidden_size"] = 7
    file.write_bytes(pretrained.serialise(record, tensors))
    with pytest.raises(ValueError, match=r"is damaged: its tensors have other sizes than its record says"):
        kind.from_pretrained(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or no safetensors file"):
        kind.from_pretrained(file)


def test_the_command_publishes_the_complete_runs_with_their_cards(published, tmp_path, capsys):
    folder, _ = published("model=skip_lstm", "model.cost_per_sample=1e-3", "seed=3")
    target = tmp_path / "results"
    overrides = [*SMALL, f"output={tmp_path}", "training.epochs=1", "model=skip_lstm"]
    settings = ["+training.train_batches=1", "model.cost_per_sample=1e-3", "seed=3,4"]
    publish.main([*overrides, *settings, f"publish={target}"])
    printed = capsys.readouterr().out
    assert "1 of 2 runs published" in printed
    verify, table = next_steps(printed)
    evaluate.main([*verify[1:], "device=cpu"])
    tables.main(table[1:])
    printed = capsys.readouterr().out
    assert "1/1 agrees" in printed
    assert f"written to {target}/" in printed
    (file,) = target.rglob("*.safetensors")
    record = folder.record()
    assert file == target / "checkpoints" / record["name"] / "model.safetensors"
    assert pretrained.read(file)[0] == record
    card = file.with_name("README.md").read_text()
    test = record["best"]["test"]
    for part in (
        "# SkipLSTM on digits, seed 3",
        "Sequences of pixels in [0, 1], 64 steps of one; 10 classes",
        "`cost_per_sample` 0.001",
        "`batch_size` 256",
        record["profile"]["note"],
        f"| test | {test['accuracy']:.4f} | {test['state_updates']:.2f} ",
        f"{record['parameters']:,} parameters",
        f"torch {torch.__version__.partition('+')[0]}",
        'SkipLSTM.from_pretrained("model.safetensors", batch_first=True)',
    ):
        assert part in card
    assert json.loads(json.dumps(record))["git"] is None or record["git"]["commit"] in card
    beside = release.card(record | {"places": [{"pack": 6}]}, load_file(file))
    assert beside.count("(of several runs at once)") == 1 + card.count("(of several runs at once)") == 1
    folder.best.unlink()  # as where another machine's record was taken over
    publish.main([*overrides, *settings, f"publish={target}"])
    printed = capsys.readouterr().out
    assert "1 of 2 runs left out: the record is here, the checkpoint is not" in printed
    assert "0 of 2 runs published" in printed


def test_nothing_to_publish_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: publish=FOLDER is missing"):
        publish.main([f"output={tmp_path}"])
    with pytest.raises(SystemExit, match=r"error: output=.*: none of the 1 runs is complete"):
        publish.main([f"output={tmp_path}", f"publish={tmp_path}/results"])
    assert not (tmp_path / "results").exists()

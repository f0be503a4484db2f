"""Files from strangers are data: nothing that they name is imported, followed, interpolated or believed of its size."""

import copy
import json
import shutil
import sys
import zipfile
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, trained
from safetensors import safe_open
from safetensors.torch import save

from skiprnn import evaluate
from skiprnn.data.base import DataError, read_npz
from skiprnn.data.imdb import IMDb
from skiprnn.data.ucf101.store import FeatureStore
from skiprnn.model import pretrained
from skiprnn.model.recurrent import Recurrent
from skiprnn.papers import records, release
from skiprnn.training import command_line
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, read_record
from skiprnn.training.setup import load, make_data
from skiprnn.views import page


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run's best.ckpt, and the published file of the same weights."""
    folder = tmp_path_factory.mktemp("honest")
    small = ["model=skip_lstm", "model.hidden_size=6", "training.epochs=1", "training.batch_size=256", "device=cpu"]
    run = command_line.read(compose([*small, "threads=1", f"output={folder}"]))
    trained(run)
    return RunFolder(run).best, release.export(RunFolder(run), folder)


@pytest.fixture(params=["ckpt", "safetensors"])
def forged(request, honest, tmp_path):
    """A function: what is changed in the identity and in the tensors -> such a file, of either kind."""

    def forge(change=lambda identity: None, of_tensors=lambda tensors: None) -> Path:
        checkpoint, published = honest
        file = tmp_path / f"forged.{request.param}"
        if request.param == "ckpt":
            content = torch.load(checkpoint, weights_only=True)
            change(content["run"])
            of_tensors(content["state_dict"])
            torch.save(content, file)
        else:
            record, tensors = copy.deepcopy(pretrained.read(published))
            change(record["config"])
            of_tensors(tensors)
            file.write_bytes(pretrained.serialise(record, tensors))
        return file

    return forge


def put(place: str, value):
    """A change: the value at a place such as data.name."""

    def change(identity):
        *above, last = place.split(".")
        reduce(dict.__getitem__, above, identity)[last] = value

    return change


def refused(file: Path, *place: str) -> str:
    """The one line with which evaluating it is refused."""
    with pytest.raises(SystemExit) as left:
        evaluate.main([f"checkpoint={file}", "device=cpu", "repetitions=1", *place])
    said = str(left.value.code)
    assert said.startswith("error: "), said
    assert "\n" not in said
    return said


def test_an_honest_file_of_either_kind_is_evaluated(forged):
    assert load(forged(), device="cpu").network.rnn.hidden_size == 6


def test_what_it_names_is_not_imported(forged, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('acted').touch()\nData = list\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "no conf/data/*.yaml has the _target_ planted.Data" in refused(forged(put("data._target_", "planted.Data")))
    assert not (tmp_path / "acted").exists()
    assert "planted" not in sys.modules


def test_what_it_names_is_not_called(forged, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("everything")

    def change(identity):
        identity["data"] = {"name": "x", "_target_": "logging.FileHandler", "filename": str(precious), "mode": "w"}

    refused(forged(change))
    assert precious.read_text() == "everything"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("imdb", "http://127.0.0.1:9/${oc.env:SECRET}.bin"),
        ("imdb", "/etc/hostname"),
        ("imdb", "../../vectors.bin"),
        ("ucf101", "../store"),
        ("ucf101", "store\0"),
    ],
)
def test_no_url_and_no_place_outside_the_data_folder_is_followed(forged, data, value, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    key = {"imdb": "vectors", "ucf101": "store"}[data]
    settings = command_line.read(compose([f"data={data}", f"profile={data}/smoke"])).data | {key: value}
    said = refused(forged(put("data", settings)), f"data_root={tmp_path / 'data'}")
    assert f"data.{key}={value!r} is no place in the data folder" in said
    assert "hunter2" not in said


def test_text_without_an_embedding_is_refused_before_any_text_is_read(forged, tmp_path):
    settings = command_line.read(compose(["data=imdb", "profile=imdb/smoke"])).data | {"vocabulary_size": 2**24}
    said = refused(forged(put("data", settings)), f"data_root={tmp_path / 'data'}")
    assert "is damaged: it holds None words and says 16777216" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model.num_layers", 10**9),
        ("model.num_layers", 2),
        ("model.hidden_size", 60_000),
        ("model.hidden_size", "6"),
        ("model.hidden_size", 6.0),
        ("model.num_layers", None),
        ("model.cell", "mystery"),
        ("model.policy", 3),
        ("model.cost_per_sample", float("nan")),
        ("model.cost_per_sample", "0"),
        ("model.colour", "red"),
        ("model.name", "../../x"),
        ("model", []),
        ("model", None),
        ("training", {}),
        ("training.batch_size", 10**18),
        ("training.epochs", "many"),
        ("data.name", "../../x"),
        ("data", "digits"),
        ("data.drop_last", "yes"),
        ("data.colour", "red"),
        ("data.batch_size", 3),
        ("seed", -1),
        ("seed", "0"),
    ],
)
def test_what_it_says_of_its_run_is_checked(forged, place, value):
    refused(forged(put(place, value)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("weight_hh"))),
        lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("weight_ih"))),
        lambda tensors: tensors.update({name: torch.tensor(1.0) for name in tensors}),
        lambda tensors: tensors.update({name: tensor[..., :1] for name, tensor in tensors.items() if tensor.dim()}),
        lambda tensors: tensors.update({"rnn.layers.7.weight_hh": torch.ones(4, 6)}),
    ],
    ids=["empty", "no weight_hh", "no weight_ih", "scalars", "narrow", "a layer more"],
)
def test_tensors_that_are_not_the_network_s_are_refused(forged, spoil):
    refused(forged(of_tensors=spoil))


def test_a_checkpoint_is_not_believed_to_hold_more_than_its_file(honest, tmp_path):
    """One number that is shown as a matrix; or zeros, compressed."""
    content = torch.load(honest[0], weights_only=True)
    one = {
        name: tensor.new_zeros([1] * tensor.dim()).expand(tensor.shape)
        for name, tensor in content["state_dict"].items()
    }
    torch.save(content | {"state_dict": one}, tmp_path / "expanded.ckpt")
    with zipfile.ZipFile(honest[0]) as plain, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as z:
        for part in plain.namelist():
            z.writestr(part, plain.read(part))
        z.writestr(f"{part.partition('/')[0]}/zeros", bytes(2**20))
    assert "its tensors have other sizes" in refused(tmp_path / "expanded.ckpt")
    assert "its parts say that they are larger than it is" in refused(tmp_path / "packed.ckpt")


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize(
    "name", ["record.json", "failed.json", "published", "plan", "config.yaml", "store.json", "model.safetensors"]
)
def test_json_may_not_be_nested_beyond_what_python_can_read(name, honest, tmp_path):
    run = RunConfig.of(torch.load(honest[0], weights_only=True)["run"], output=str(tmp_path))
    folder, told = RunFolder(run), []
    folder.path.mkdir(parents=True)
    (tmp_path / "sweeps").mkdir()
    file = {"published": tmp_path / "x.json", "plan": tmp_path / "sweeps" / "x.json"}.get(name, folder.path / name)
    file.write_text(DEEP)
    match name:
        case "record.json":
            assert "is damaged; delete it" in str(folder.damage)
        case "failed.json":
            assert "is damaged" in str(folder.failure)
        case "published":
            with pytest.raises(ConfigError, match="is damaged; delete it"):
                records.read_published(file)
        case "plan" | "config.yaml":
            assert page.sweeps(tmp_path, told.append) == []
            assert len(told) == 1
        case "store.json":
            (folder.path / "index.csv").touch()
            np.save(folder.path / "features.npy", np.zeros((3, 2), np.float16))
            with pytest.raises(DataError, match="is corrupt"):
                FeatureStore(folder.path)
        case _:
            with safe_open(honest[1], "pt") as honest_file:
                weights = {key: honest_file.get_tensor(key) for key in honest_file.keys()}  # noqa: SIM118
            file.write_bytes(save(weights, {pretrained.KEY: DEEP}))
            with pytest.raises(ValueError, match=r"was not written by skiprnn\.publish"):
                Recurrent.from_pretrained(file)


MISSING = object()


@pytest.mark.parametrize(
    "place",
    [
        *("task", "steps", "solved_at", "input_flops", "best", "final", "best.test", "final.test", "best.validation"),
        *("best.test.accuracy", "final.test.accuracy", "best.validation.accuracy", "best.test.state_updates"),
        *("best.test.inference_flops", "note", "profile"),
    ],
)
@pytest.mark.parametrize(
    "value", [MISSING, "x", [], float("nan"), 10**400], ids=["missing", "text", "list", "nan", "huge"]
)
def test_a_record_is_read_if_it_has_what_tables_and_figures_show(place, value, honest, tmp_path):
    record = json.loads(honest[0].with_name("record.json").read_bytes())
    run = RunConfig.of(record["config"])
    *above, last = place.split(".")
    part = reduce(dict.__getitem__, above, record)
    if value is MISSING:
        del part[last]
    else:
        part[last] = value
    (tmp_path / "record.json").write_text(json.dumps(record))
    if (place, value) in (("task", MISSING), ("note", MISSING), ("profile", MISSING), ("note", "x")):
        read_record(tmp_path / "record.json", run)  # older ones
        return
    with pytest.raises(ConfigError, match=r"record.json is damaged; delete it"):
        read_record(tmp_path / "record.json", run)


def test_a_record_does_not_say_where_it_is_published(honest, tmp_path):
    run = RunConfig.of(torch.load(honest[0], weights_only=True)["run"], output=str(tmp_path / "out"))
    folder = RunFolder(run)
    shutil.copytree(honest[0].parent, folder.path)
    record = json.loads(folder.record_file.read_bytes())
    folder.record_file.write_text(json.dumps(record | {"name": "../../../elsewhere"}))
    assert release.export(folder, tmp_path / "public").is_relative_to(tmp_path / "public" / "checkpoints" / run.name)
    folder.record_file.write_text(json.dumps(record | {"versions": None}))
    with pytest.raises(ConfigError, match=r"record.json is damaged .*; delete it"):
        release.export(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_that_are_nan_are_said_and_not_scored(forged):
    spoil = lambda tensors: tensors.update({name: tensor * float("nan") for name, tensor in tensors.items()})  # noqa: E731
    assert "weights that are nan or infinite" in refused(forged(of_tensors=spoil))


def change_record(published: Path, target: Path, change) -> Path:
    record, tensors = copy.deepcopy(pretrained.read(published))
    change(record, tensors)
    target.write_bytes(pretrained.serialise(record, tensors))
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda record, tensors: record["config"]["model"].update(num_layers=10**9),
        lambda record, tensors: record["config"]["model"].update(hidden_size=10**9),
        lambda record, tensors: record["config"]["model"].pop("cell"),
        lambda record, tensors: record["config"]["model"].update(cell=["lstm"]),
        lambda record, tensors: record["config"]["model"].update(p_skip="often"),
        lambda record, tensors: record["config"].update(model="lstm"),
        lambda record, tensors: record.clear(),
        lambda record, tensors: tensors.update({"rnn.layers.0.weight_ih": torch.tensor(3.0)}),
        lambda record, tensors: tensors.update({"rnn.layers.0.weight_ih": torch.ones(24)}),
        lambda record, tensors: tensors.update({name: tensor / 0 for name, tensor in tensors.items()}),
    ],
)
def test_from_pretrained_says_in_one_line_what_is_wrong(honest, tmp_path, change):
    file = change_record(honest[1], tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError, match=r"checkpoint .*x\.safetensors ") as raised:
        Recurrent.from_pretrained(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("best", [None, {}, {"test": None}, {"test": {"accuracy": "high", "state_updates": 1}}])
def test_a_record_without_results_is_named(honest, tmp_path, best):
    file = change_record(honest[1], tmp_path / "x.safetensors", lambda record, tensors: record.update(best=best))
    with pytest.raises(SystemExit, match=r"^error: checkpoint .*x\.safetensors: its record has no test results"):
        evaluate.main([f"verify={tmp_path}", "device=cpu"])
    assert file.exists()


def huge_npz(file: Path) -> None:
    """An .npz whose array says that it holds 8 TB."""
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2000000000000,), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ends.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))


def test_arrays_are_not_believed_to_be_larger_than_their_file(tmp_path):
    huge_npz(tmp_path / "huge.npz")
    with pytest.raises(ValueError, match=r"says it has shape \(2000000000000,\)"):
        read_npz(tmp_path / "huge.npz", "ends")


@pytest.mark.parametrize("name", ["vectors.bin", "vectors.txt"])
def test_vectors_are_not_believed_to_be_more_than_their_file(tmp_path, name):
    pytest.importorskip("gensim")
    (tmp_path / name).write_bytes(b"1000000000 300\nword 1 2 3")
    data = IMDb(vectors=str(tmp_path / name), root=str(tmp_path), vocabulary_size=3)
    with pytest.raises(DataError, match="1000000000 words of width 300, more than it can hold"):
        data.embeddings(300)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"tokens": np.array([1, 2, 9], np.int32)},
        {"tokens": np.array([1, 2, -1], np.int32)},
        {"labels": np.array([0, 1, 2, 1])},
        {"ends": np.array([1, 2])},
        {"ends": np.array([1, 0, 2, 3])},
        {"ends": np.array([[1]])},
        {"tokens": np.array(["a", "b", "c"])},
    ],
    ids=["id too large", "id below 0", "a third class", "reviews missing", "ends fall", "two dimensions", "words"],
)
def test_token_files_are_checked(tmp_path, spoiled):
    data = IMDb(length=2, vocabulary_size=9, reviews_per_class=1, root=str(tmp_path))
    data.tokens_file.parent.mkdir()
    sound = {"tokens": np.array([1, 2, 8], np.int32), "ends": np.array([1, 1, 2, 3]), "labels": np.array([0, 1, 0, 1])}
    sound["words"] = np.frombuffer(b"[PAD]\n[UNK]", np.uint8)
    np.savez(data.tokens_file, **sound)
    assert len(data.read()["test"].targets) == 2
    np.savez(data.tokens_file, **sound | spoiled)
    with pytest.raises(DataError, match=r"tokenised-.*npz is damaged .*; delete it to make it again"):
        data.read()


@pytest.mark.parametrize(
    ("name", "content"), [("store.json", b"[]"), ("features.npy", b"nothing"), ("index.csv", b"a,b,c,d\n")]
)
def test_feature_stores_are_checked(tmp_path, name, content):
    (tmp_path / "store.json").write_text(json.dumps({"width": 2}))
    (tmp_path / "index.csv").write_text("v_A_g01_c01,A,0,3\n")
    np.save(tmp_path / "features.npy", np.zeros((3, 2), np.float16))
    assert FeatureStore(tmp_path).width == 2
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"is corrupt .*; delete it and make it again"):
        FeatureStore(tmp_path)


def test_a_data_set_of_ones_own_is_known_by_its_config(tmp_path, monkeypatch):
    """conf/data/*.yaml where the command is started names it: what a file says then is no news."""
    own = compose(["data=digits"])
    (tmp_path / "mine.py").write_text("from skiprnn.data.digits import SequentialDigits as Mine\n")
    own.data._target_ = "mine.Mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no conf/data/\*.yaml has the _target_ mine.Mine"):
        make_data(command_line.read(own))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("name: mine\n_target_: mine.Mine\n")
    assert type(make_data(command_line.read(own))).__name__ == "SequentialDigits"

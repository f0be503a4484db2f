"""IMDb against reviews written for the purpose, and against the first reviews of the published archive."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_small_imdb
from gensim.models import KeyedVectors

from skiprnn.data import imdb
from skiprnn.data.base import MIRROR, DataError
from skiprnn.data.imdb import LABELLED, OFFICIAL, IMDb, read_reviews

ARCHIVE = Path(os.environ.get(MIRROR, ""), LABELLED.name)
needs_imdb = pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"{MIRROR} names no folder with {LABELLED.name}")

PER_CLASS = 10  # 20 training reviews, 3 of them for validation


def text(part: str, label: str, number: int) -> str:
    """Every review of the training file says "film" twice, its class's word once, and ends in a word of its own."""
    words = {"pos": "good", "neg": "bad"}
    start = f'Film, film!<br /><br />It\'s "{words[label]}"...' if part == "train" else "Zebra film"
    return f"{start} {label}{part}{number}"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data folder with an unpacked aclImdb."""
    monkeypatch.delenv(MIRROR, raising=False)
    make_small_imdb(tmp_path, text, PER_CLASS)
    unlabelled = tmp_path / "imdb" / "aclImdb" / "train" / "unsup"
    unlabelled.mkdir()
    (unlabelled / "0_0.txt").write_text("never seen")
    return tmp_path


def loaded(root: Path, padding: str = "right", **settings) -> IMDb:
    data = IMDb(root=str(root), reviews_per_class=PER_CLASS, padding=padding, **settings)
    data.prepare()
    data.load("cpu")
    return data


def written(data: IMDb, row: torch.Tensor) -> list[str]:
    words = data.words()
    return [words[token] for token in row.tolist()]


def test_a_review_by_hand(root):
    data = loaded(root, length=14, lowercase=True, padding="right", batch_size=1)
    for inputs, targets, lengths in data.training_batches(0):
        tokens = written(data, inputs[0])
        assert tokens[:8] == ["film", ",", "film", "!", "it's", '"', ["bad", "good"][targets], '"']
        assert tokens[8:11] == [".", ".", "."]
        assert tokens[11].startswith(["negtrain", "postrain"][targets])
        assert tokens[12:] == ["[PAD]", "[PAD]"]
        assert lengths is None


def test_vocabulary_is_of_the_training_split_from_frequent_to_rare(root):
    data = loaded(root, length=14)
    words = data.words()
    assert words[:2] == ["[PAD]", "[UNK]"]
    assert words[2] == "."  # 51 times
    assert words[3:5] == ['"', "film"]  # 34 times each; words of the same count are in alphabetical order
    assert words[5:8] == ["!", ",", "it's"]  # 17 times each
    assert set(words[8:10]) == {"good", "bad"}
    assert len(words) == 10 + 17  # the own words of the 17 training reviews, none of the 3 for validation
    assert "zebra" not in words
    for row in data.splits["test"].inputs:
        assert written(data, row)[:4] == ["[UNK]", "film", "[UNK]", "[PAD]"]
    for row in data.splits["validation"].inputs:
        assert written(data, row)[11] == "[UNK]"


def test_vocabulary_limits(root):
    assert len(loaded(root, vocabulary_size=5).words()) == 5
    assert len(loaded(root, min_count=2).words()) == 10
    assert "Film" in loaded(root, lowercase=False).words()
    assert "Film" not in loaded(root).words()


def test_splits_are_stratified_and_the_same_for_all_seeds(root):
    data, other = loaded(root, seed=0), loaded(root, seed=1, length=14)
    assert data.examples == {"train": 17, "validation": 3, "test": 20}
    assert {name: len(split) for name, split in data.splits.items()} == data.examples
    assert sorted(data.splits["validation"].targets.bincount().tolist()) == [1, 2]
    assert data.splits["test"].targets.tolist() == [0] * 10 + [1] * 10
    assert torch.equal(data.splits["train"].inputs[:, :14], other.splits["train"].inputs)


def test_crop_pad_and_lengths(root):
    right = loaded(root, length=14, mask_padding=True).splits
    left = loaded(root, length=14, padding="left").splits
    cropped = loaded(root, length=2, mask_padding=True).splits
    assert right["train"].lengths.tolist() == [12] * 17
    assert right["test"].lengths.tolist() == [3] * 20
    assert cropped["test"].lengths.tolist() == [2] * 20
    assert torch.equal(cropped["train"].inputs, right["train"].inputs[:, :2])
    assert torch.equal(left["train"].inputs.roll(-2, 1), right["train"].inputs)
    assert (left["train"].inputs[:, :2] == 0).all()


def archive_of(folder: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "aclImdb")
        escape = tarfile.TarInfo("../escaped.txt")
        escape.size = 4
        archive.addfile(escape, io.BytesIO(b"evil"))


def test_the_caption_says_how_reviews_are_padded():
    assert IMDb().note == "padded on the left, padded steps count as all others; embeddings start from U(-0.25, 0.25)"
    assert IMDb(padding="right", vectors="v.bin").note.startswith("padded on the right, padded steps count")
    assert "padded steps do not count; " in IMDb(padding="right", mask_padding=True).note


def test_archive_and_folder_give_the_same(root, tmp_path_factory, monkeypatch):
    mirror, elsewhere = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("root")
    archive_of(root / "imdb" / "aclImdb", mirror / LABELLED.name)
    from_folder = loaded(root)
    monkeypatch.setenv(MIRROR, str(mirror))
    from_archive = loaded(elsewhere)
    assert from_archive.words() == from_folder.words()
    for name, split in from_folder.splits.items():
        assert torch.equal(split.inputs, from_archive.splits[name].inputs)
    assert {path.name for path in (elsewhere / "imdb").iterdir()} == {
        Path(LABELLED.name).name,
        from_archive.tokens_file.name,
    }
    assert not list(elsewhere.parent.rglob("escaped.txt"))


def test_tokens_are_kept_and_made_again_when_broken(root):
    data = loaded(root)
    before = data.tokens_file.read_bytes()
    (root / "imdb" / "aclImdb" / "train" / "pos" / "0_5.txt").unlink()
    data.prepare()  # the reviews are not read again
    assert data.tokens_file.read_bytes() == before
    os.truncate(data.tokens_file, 100)
    with pytest.raises(DataError, match="train/pos holds 9 reviews instead of 10"):
        data.prepare()


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.2, 0.5, 0.9, 0.995])
def test_a_truncated_archive_is_named(root, tmp_path_factory, monkeypatch, kept):
    mirror, elsewhere = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("root")
    archive_of(root / "imdb" / "aclImdb", mirror / LABELLED.name)
    os.truncate(mirror / LABELLED.name, int(kept * (mirror / LABELLED.name).stat().st_size))
    monkeypatch.setenv(MIRROR, str(mirror))
    with pytest.raises(DataError, match=r"aclImdb_labelled.tar.gz is corrupt or truncated .*delete it"):
        loaded(elsewhere)


@pytest.mark.parametrize("target", ["train/neg/0_5.txt", "elsewhere.txt"])
def test_a_link_in_an_archive_is_no_review(target, root, tmp_path_factory, monkeypatch):
    mirror, elsewhere = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("root")
    archive_of(root / "imdb" / "aclImdb", mirror / LABELLED.name)
    with gzip.open(mirror / LABELLED.name) as plain:
        content = io.BytesIO(plain.read())
    link = tarfile.TarInfo("aclImdb/train/pos/99_9.txt")
    link.type, link.linkname = tarfile.LNKTYPE, target
    with tarfile.open(fileobj=content, mode="a:") as archive:
        archive.addfile(link)
    (mirror / LABELLED.name).write_bytes(gzip.compress(content.getvalue()))
    monkeypatch.setenv(MIRROR, str(mirror))
    with pytest.raises(DataError, match=r"aclImdb_labelled.tar.gz is corrupt or truncated .*; delete it|11 reviews"):
        loaded(elsewhere)


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], after: bytes = b"") -> None:
    """An archive of these members, and no more than these bytes of them, whatever they say."""
    content = io.BytesIO()
    for member, held in members:
        content.write(member.tobuf(tarfile.PAX_FORMAT) + held)
    content.write(after)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.getvalue()))


def info(name: str, size: int, **pax: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"aclImdb/{name}")
    member.size, member.pax_headers = size, pax
    return member


@pytest.mark.parametrize(
    ("members", "after", "complaint"),
    [
        ([(info("train/pos/0_9.txt", 2**33), b"good")], b"", r"train/pos/0_9.txt says it has 8,589,934,592 bytes"),
        ([(info("train/unsup/0_0.txt", 2**21), bytes(2**21))], b"", "it holds more than 1,048,576 bytes"),
        ([(info("train/pos/0_9.txt", 0, comment="x" * 2**21), b"")], b"", "it holds more than 1,048,576 bytes"),
        ([], bytes(2**21), "it holds more than 1,048,576 bytes"),
    ],
    ids=["review", "other file", "header", "after the end"],
)
def test_an_archive_that_unpacks_to_far_more_than_the_data_set_is_refused(
    members, after, complaint, tmp_path, monkeypatch
):
    """Before it is read, where it says so itself; a review of 8 GB is told by its header."""
    monkeypatch.setattr(imdb, "LARGEST", 2**20)
    packed(tmp_path / LABELLED.name, *members, after=after)
    assert (tmp_path / LABELLED.name).stat().st_size < 2**14
    with pytest.raises(DataError, match=complaint):
        read_reviews(tmp_path / LABELLED.name)


def test_too_few_reviews_are_said(root):
    for file in root.glob("imdb/aclImdb/*/*/[1-9]_5.txt"):
        file.unlink()
    with pytest.raises(DataError, match=r"^1 reviews per class are too few: none would be left to validate on$"):
        IMDb(root=str(root), reviews_per_class=1).prepare()


def test_a_damaged_vocabulary_is_named(root):
    data = loaded(root, vocabulary_size=50)
    with np.load(data.tokens_file) as stored:
        content = {name: stored[name] for name in ("tokens", "ends", "labels")}
    for words in ({"words": np.array([255], np.uint8)}, {"words": np.frombuffer(b"\n" * 99, np.uint8)}, {}):
        np.savez(data.tokens_file, **content | words)
        with pytest.raises(DataError, match=r"tokenised-.*npz is damaged .*; delete it"):
            data.words()


def test_the_official_archive_is_verified(tmp_path, monkeypatch):
    monkeypatch.delenv(MIRROR, raising=False)
    (tmp_path / "imdb").mkdir()
    (tmp_path / OFFICIAL.name).write_bytes(b"something else")
    with pytest.raises(DataError, match=rf"aclImdb_v1.tar.gz is corrupt or truncated .*{OFFICIAL.md5}.*delete"):
        loaded(tmp_path)


@needs_imdb
def test_first_reviews_of_the_published_archive():
    reviews = read_reviews(ARCHIVE)
    for folder in ("train/neg/", "train/pos/", "test/neg/", "test/pos/"):
        assert sum(name.startswith(folder) for name in reviews) == 12_500
    assert len(reviews) == 50_000
    assert reviews["train/pos/0_9.txt"].startswith("Bromwell High is a cartoon comedy. It ran at the same time as")
    assert reviews["train/neg/0_3.txt"].startswith("Story of a man who has unnatural feelings for a pig.")
    assert reviews["test/pos/0_10.txt"].startswith("I went and saw this movie last night after being coaxed to by")
    assert reviews["test/neg/0_2.txt"].startswith("Once again Mr. Costner has dragged out a movie for far longer")


# word vectors


@pytest.mark.parametrize("name", ["vectors.bin", "vectors.txt"])
def test_embeddings_start_from_word2vec(root, tmp_path, name):
    vectors = KeyedVectors(3)
    vectors.add_vectors(["film", "good", "elsewhere"], np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32))
    vectors.save_word2vec_format(str(tmp_path / name), binary=name.endswith(".bin"))
    place = str(tmp_path / name) if name.endswith(".bin") else name  # below the data folder
    data = loaded(root, vectors=place, vocabulary_size=50)
    table = data.embeddings(3)
    assert table.shape == (50, 3)
    words = data.words()
    assert table[words.index("film")].tolist() == [1, 2, 3]
    assert table[words.index("good")].tolist() == [4, 5, 6]
    others = torch.tensor([row not in (words.index("film"), words.index("good")) for row in range(50)])
    assert table[others].abs().max() <= 0.25


def test_embeddings_without_vectors_are_uniform_and_of_the_seed(root):
    table = loaded(root, vocabulary_size=1000).embeddings(300)
    assert table.abs().max() <= 0.25
    assert table.var().item() == pytest.approx(0.5**2 / 12, rel=0.01)
    assert torch.equal(loaded(root, vocabulary_size=1000).embeddings(300), table)
    assert not torch.equal(loaded(root, vocabulary_size=1000, seed=1).embeddings(300), table)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("1 2\nfilm 1 2\n", "holds vectors of width 2; the embedding's is 3"),
        ("1 3\nfilm 1 nan 2\n", "holds vectors that are nan or infinite"),
        ("1 3\nfilm 1 2\n", "cannot read the word2vec file"),
        ("2 3\nfilm 1 2 3\n", "cannot read the word2vec file"),
        ("no header\n", "cannot read the word2vec file"),
        (None, "cannot read the word2vec file"),
    ],
)
def test_a_word2vec_file_that_does_not_fit_is_named(root, tmp_path, content, complaint):
    path = tmp_path / "vectors.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=f"(?s)(vectors.txt.*{complaint}|{complaint}.*vectors.txt)"):
        loaded(root, vectors=str(path)).embeddings(3)

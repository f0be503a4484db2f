"""Data sets against facts known from elsewhere: published counts and checksums, closed forms, examples seen by hand."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from skiprnn.data.adding import Adding
from skiprnn.data.base import (
    MIRROR,
    Batches,
    DataError,
    SequenceData,
    Source,
    Split,
    StoredData,
    fetch,
    replacing,
    seeded,
)
from skiprnn.data.digits import SequentialDigits
from skiprnn.data.frequency import FrequencyDiscrimination
from skiprnn.data.mnist import SequentialMNIST

MIRROR_FOLDER = os.environ.get(MIRROR)
needs_mnist = pytest.mark.skipif(
    not (MIRROR_FOLDER and Path(MIRROR_FOLDER, "mnist").is_dir()), reason=f"{MIRROR} names no folder with mnist/"
)
IMAGES = "train-images-idx3-ubyte.gz"


def joined(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets, _ = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def loaded(data: SequenceData) -> SequenceData:
    data.prepare()
    data.load("cpu")
    return data


class Rows(StoredData):
    """Ten examples whose input says which row they are."""

    input_size, steps, outputs, task = 1, 1, 10, "classification"
    examples = {"train": 10, "validation": 3, "test": 4}  # noqa: RUF012

    def read(self):
        return {
            name: Split(torch.arange(n).float().view(n, 1, 1), torch.arange(n)) for name, n in self.examples.items()
        }


# shuffling and batches


def test_every_epoch_holds_each_training_example_once_in_another_order():
    data = loaded(Rows(batch_size=4, seed=0))
    epochs = [joined(data.training_batches(epoch))[1].tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 5


def test_the_order_depends_on_seed_and_epoch_alone():
    first = joined(loaded(Rows(4, seed=3)).training_batches(7))[1]
    data = loaded(Rows(4, seed=3))
    torch.manual_seed(99)
    joined(data.training_batches(0))
    torch.rand(5)
    assert torch.equal(joined(data.training_batches(7))[1], first)
    assert not torch.equal(joined(loaded(Rows(4, seed=4)).training_batches(7))[1], first)


def test_the_order_is_the_same_in_another_process():
    program = (
        "from skiprnn.data.base import seeded; import torch; print(torch.randperm(9, generator=seeded(1, 'train', 2)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(torch.randperm(9, generator=seeded(1, "train", 2)))


def test_streams_differ():
    draws = {
        tuple(torch.randperm(20, generator=seeded(seed, stream, epoch)).tolist())
        for seed in (0, 1)
        for stream in ("train", "validation", "test")
        for epoch in (0, 1)
    }
    assert len(draws) == 12


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_drop_last_is_for_training_only(drop_last, sizes):
    data = loaded(Rows(4, drop_last=drop_last))
    training = data.training_batches(0)
    assert len(training) == len(sizes)
    assert [len(targets) for _, targets, _ in training] == sizes
    evaluation = loaded(Rows(3, drop_last=drop_last)).evaluation_batches("test")
    assert len(evaluation) == 2
    assert [targets.tolist() for _, targets, _ in evaluation] == [[0, 1, 2], [3]]


def test_a_batch_keeps_inputs_targets_and_lengths_together():
    split = Split(torch.arange(4).float().view(4, 1, 1), torch.arange(4) * 10, torch.arange(4) + 1)
    inputs, targets, lengths = split.take(torch.tensor([2, 0]))
    assert inputs.flatten().tolist() == [2, 0]
    assert targets.tolist() == [20, 0]
    assert lengths.tolist() == [3, 1]


def test_runs_in_one_process_share_what_was_read(monkeypatch):
    """Read once, held once; each seed's order is what it is alone."""
    orders, reads = {}, []
    for seed in (0, 1):
        monkeypatch.setattr(StoredData, "_loaded", {})
        orders[seed] = joined(loaded(Rows(batch_size=4, seed=seed)).training_batches(0))[1].tolist()
    monkeypatch.setattr(StoredData, "_loaded", {})
    read = Rows.read
    monkeypatch.setattr(Rows, "read", lambda self: reads.append(self) or read(self))
    together = [loaded(Rows(batch_size=4, seed=seed)) for seed in (0, 1)]
    assert len(reads) == 1
    assert together[0].splits["train"].inputs is together[1].splits["train"].inputs
    assert {data.seed: joined(data.training_batches(0))[1].tolist() for data in together} == orders
    assert orders[0] != orders[1]


def test_a_file_is_read_for_its_checksum_once_while_it_is_the_same(tmp_path, monkeypatch):
    path, digests = tmp_path / "file", []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: digests.append(given) or digest(*given))
    path.write_bytes(b"as published")
    source = Source("file", hashlib.md5(b"as published").hexdigest())
    for _ in range(3):
        assert fetch(tmp_path, source) == path
    assert len(digests) == 1
    path.write_bytes(b"AS PUBLISHED")  # no longer, and as long
    for _ in range(2):
        with pytest.raises(DataError, match="corrupt"):
            fetch(tmp_path, source)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"), ({"batch_size": 11, "drop_last": True}, "drop_last")],
)
def test_arguments_out_of_range_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        loaded(Rows(**arguments)).training_batches(0)


# files


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [[], ["old"]])
def test_an_interrupted_write_leaves_all_as_it_was(tmp_path, before):
    for content in before:
        (tmp_path / "file").write_text(content)
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "file")
    assert [path.read_text() for path in tmp_path.iterdir()] == before


# digits


def test_digits_are_scikit_learns_images_in_raster_order():
    data = loaded(SequentialDigits())
    images = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*load_digits_images(), strict=True)}
    seen = 0
    for split, count in {"train": 1197, "validation": 300, "test": 300}.items():
        inputs, targets = data.splits[split].inputs, data.splits[split].targets
        assert inputs.shape == (count, 64, 1) == (data.examples[split], data.steps, data.input_size)
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        for x, y in zip(inputs, targets, strict=True):
            assert images.pop(tuple((x * 16).flatten().tolist())) == y  # pop: no image is in two splits
            seen += 1
    assert seen == 1797
    assert not images


@pytest.mark.parametrize(("pixels", "hold", "steps"), [(2, 2, 64), (4, 1, 16), (8, 3, 24)])
def test_digits_are_shown_some_pixels_at_a_time_each_for_some_steps(pixels, hold, steps):
    data, plain = loaded(SequentialDigits(pixels=pixels, hold=hold)), loaded(SequentialDigits())
    assert (data.input_size, data.steps) == (pixels, steps)
    for split in ("train", "validation", "test"):
        inputs, targets, _ = data.splits[split].take(torch.arange(40))
        images, same, _ = plain.splits[split].take(torch.arange(40))
        assert torch.equal(targets, same)
        assert inputs.shape == (40, steps, pixels)
        for step in range(steps):
            first = step // hold * pixels
            assert torch.equal(inputs[:, step], images[:, first : first + pixels, 0])


@pytest.mark.parametrize(("pixels", "hold"), [(1, 1), (2, 2), (8, 3)])
def test_the_picture_of_held_digits_has_every_row_as_often_as_it_is_shown(pixels, hold):
    data = loaded(SequentialDigits(pixels=pixels, hold=hold))
    images = {tuple(image.flatten()) for image in load_digits().images}
    for row in range(20):
        image = data.picture(data.splits["test"].inputs[row].numpy())
        assert image.shape == data.image == (8 * hold, 8)
        assert all(tuple(image[k::hold].flatten() * 16) in images for k in range(hold))
    steps = data.picture(np.arange(data.steps)[:, None, None] + np.zeros((1, pixels, 3)))[..., 0]
    assert (np.diff(steps[::hold], axis=1) % hold == 0).all(), (
        "a row has what was shown first, the next what was second"
    )
    assert (steps[:hold, 0] == np.arange(hold)).all()


def load_digits_images():
    digits = load_digits()
    return digits.images, digits.target


def test_digits_splits_have_every_class_alike():
    data = loaded(SequentialDigits())
    overall = torch.from_numpy(load_digits().target).bincount() / 1797
    for split in ("train", "validation", "test"):
        targets = data.splits[split].targets
        assert (targets.bincount() - overall * len(targets)).abs().max() <= 1


# MNIST


@pytest.fixture
def mnist_root(tmp_path, monkeypatch):
    monkeypatch.setenv(MIRROR, str(MIRROR_FOLDER))
    return tmp_path


@needs_mnist
def test_mnist_splits(mnist_root):
    data = loaded(SequentialMNIST(root=str(mnist_root)))
    assert {name: len(split) for name, split in data.splits.items()} == data.examples
    assert data.examples == {"train": 55_000, "validation": 5_000, "test": 10_000}
    train, validation, test = (data.splits[name] for name in ("train", "validation", "test"))
    assert train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the first labels that every tutorial shows
    assert test.targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert validation.targets[-1] == 8
    # examples per class as published for the training and the test file
    assert (train.targets.bincount() + validation.targets.bincount()).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert test.targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_mnist
def test_mnist_pixels(mnist_root):
    data = loaded(SequentialMNIST(root=str(mnist_root)))
    inputs = data.splits["train"].inputs
    assert inputs.shape[1:] == (data.steps, data.input_size) == (784, 1)
    # the first image is the 5 whose first stroke begins in row 5, column 12, with grey level 3
    assert inputs[0].flatten().nonzero()[0] == 5 * 28 + 12
    assert inputs[0, 5 * 28 + 12] * 255 == pytest.approx(3)
    everything = torch.cat([inputs, data.splits["validation"].inputs])
    assert everything.mean().item() == pytest.approx(0.1307, abs=5e-5)  # the published mean and deviation
    assert everything.std().item() == pytest.approx(0.3081, abs=5e-5)


@needs_mnist
def test_mnist_drops_the_last_incomplete_batch(mnist_root):
    data = loaded(SequentialMNIST(root=str(mnist_root), batch_size=256))
    assert len(data.training_batches(0)) == 214  # 55000 = 214 * 256 + 216
    assert len(data.evaluation_batches("test")) == 40  # 10000 = 39 * 256 + 16


@needs_mnist
def test_mnist_from_a_mirror_that_is_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv(MIRROR, Path(MIRROR_FOLDER).resolve().as_uri())
    SequentialMNIST(root=str(tmp_path)).prepare()
    monkeypatch.delenv(MIRROR)
    SequentialMNIST(root=str(tmp_path)).prepare()  # everything is there: no source is asked
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
        IMAGES,
        "train-labels-idx1-ubyte.gz",
    ]


def test_without_network_and_mirror_one_error_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv(MIRROR, raising=False)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/", "http://localhost:9/"])
    with pytest.raises(DataError, match=f"(?s)connect to the internet.*{MIRROR}.*127.0.0.1"):
        SequentialMNIST(root=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    "mirror",
    [
        *("", "http://", "http://[half", "http://127.0.0.1:port", "data://x", "unknown://x", "file://elsewhere/x"),
        *("~nobody_of_this_name/x", "nowhere", "a b://c", "http://127.0.0.1:9/a b"),
    ],
)
def test_a_mirror_that_is_none_gives_one_line(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv(MIRROR, mirror)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [])
    with pytest.raises(
        DataError, match=rf"^cannot get mnist/{IMAGES}: .* or set {MIRROR} to a folder or URL"
    ) as raised:
        SequentialMNIST(root=str(tmp_path)).prepare()
    assert "\n" not in str(raised.value)
    assert mirror.rstrip("/") in str(raised.value)


@needs_mnist
@pytest.mark.parametrize("size", [0, 100_000])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path, monkeypatch, size):
    monkeypatch.delenv(MIRROR, raising=False)
    shutil.copytree(Path(MIRROR_FOLDER, "mnist"), tmp_path / "mnist")
    os.truncate(tmp_path / "mnist" / IMAGES, size)
    with pytest.raises(DataError, match=f"{IMAGES} is corrupt or truncated .*delete"):
        SequentialMNIST(root=str(tmp_path)).load("cpu")


def test_a_mirror_with_another_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    (mirror / "mnist").mkdir(parents=True)
    (mirror / "mnist" / IMAGES).write_bytes(gzip.compress(b"not the images"))
    monkeypatch.setenv(MIRROR, str(mirror))
    with pytest.raises(DataError, match=f"{IMAGES} is corrupt or truncated .*{mirror}.*{MIRROR}"):
        SequentialMNIST(root=str(root)).prepare()
    assert not list((root / "mnist").iterdir())


@needs_mnist
def test_an_unwritable_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(MIRROR, str(MIRROR_FOLDER))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to the data folder .*file"):
        SequentialMNIST(root=str(tmp_path / "file")).prepare()


# the adding task


def test_adding_sums_the_two_marked_values():
    data = loaded(Adding(batch_size=64, batches_per_epoch=2, validation_batches=3, test_batches=1))
    for batches, count in [(data.training_batches(0), 2), (data.evaluation_batches("validation"), 3)]:
        assert len(batches) == count
        inputs, targets = joined(batches)
        values, markers = inputs.unbind(2)
        assert inputs.shape == (64 * count, 50, 2)
        assert set(markers.unique().tolist()) == {0, 1}
        assert (markers.sum(1) == 2).all()
        assert torch.allclose((values * markers).sum(1), targets)
        assert values.min() >= -0.5
        assert values.max() < 0.5


def marked_steps(data: Adding, batches: Batches) -> torch.Tensor:
    """(N, 2): the two marked steps of each sequence in order of time."""
    return torch.cat([inputs[..., 1].nonzero()[:, 1].view(-1, 2) for inputs, _, _ in batches])


def test_adding_of_skip_rnn_marks_the_first_tenth_and_the_second_half():
    data = loaded(Adding(length=50, batch_size=500, batches_per_epoch=10))
    first, second = marked_steps(data, data.training_batches(0)).unbind(1)
    assert Counter(first.tolist()).keys() == set(range(5))
    assert Counter(second.tolist()).keys() == set(range(25, 50))
    assert (first.bincount() - 1000).abs().max() < 6 * (5000 * 0.2 * 0.8) ** 0.5  # uniform, within six deviations
    assert (second.bincount()[25:] - 200).abs().max() < 6 * (5000 * 0.04 * 0.96) ** 0.5


def test_adding_of_sa_rnn_marks_any_pair_of_steps_alike():
    data = loaded(Adding(length=5, low=0, high=1, markers="anywhere", batch_size=500, batches_per_epoch=10))
    pairs = Counter(map(tuple, marked_steps(data, data.training_batches(0)).tolist()))
    assert len(pairs) == 10
    assert all(abs(count - 500) < 6 * (5000 * 0.1 * 0.9) ** 0.5 for count in pairs.values())


@pytest.mark.parametrize(("low", "high", "markers", "mean"), [(-0.5, 0.5, "halves", 0.0), (0.0, 1.0, "anywhere", 1.0)])
def test_adding_target_has_the_stated_variance(low, high, markers, mean):
    data = loaded(Adding(20, low, high, markers, batch_size=1000, batches_per_epoch=40))
    assert data.target_variance == pytest.approx(1 / 6)
    _, targets = joined(data.training_batches(0))
    # sum of two uniforms: variance 1/6, so the mean of 40000 deviates by 0.002, the variance by 0.0010
    assert targets.mean().item() == pytest.approx(mean, abs=0.01)
    assert targets.var().item() == pytest.approx(1 / 6, abs=0.005)


def test_adding_training_is_fresh_and_repeatable_and_evaluation_is_fixed():
    settings = {"batch_size": 4, "batches_per_epoch": 2, "validation_batches": 2, "test_batches": 2}
    data, again = loaded(Adding(seed=1, **settings)), loaded(Adding(seed=1, **settings))
    epochs = [joined(data.training_batches(epoch))[0] for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert not torch.equal(*epochs[0].chunk(2))
    assert torch.equal(joined(again.training_batches(1))[0], epochs[1])
    fixed = [joined(data.evaluation_batches(split))[0] for split in ("validation", "test")]
    assert not torch.equal(*fixed)
    assert torch.equal(joined(data.evaluation_batches("test"))[0], fixed[1])
    assert torch.equal(joined(again.evaluation_batches("test"))[0], fixed[1])
    other = loaded(Adding(seed=2, **settings))
    assert not torch.equal(joined(other.evaluation_batches("test"))[0], fixed[1])


# frequency discrimination


def test_frequency_waves_are_those_of_their_periods():
    """Neighbours of a sampled cosine satisfy x[t-1] + x[t+1] = 2 cos(w) x[t], which gives the period back."""
    data = loaded(FrequencyDiscrimination(0.5, low=1.5, batch_size=100, batches_per_epoch=20))
    inputs, targets = joined(data.training_batches(0))
    assert inputs.shape == (2000, 200, 1) == (2000, data.steps, data.input_size)
    assert inputs.abs().max() <= 1
    x = inputs.squeeze(2).double()
    middle = x[:, 1:-1]
    cosine = ((x[:, :-2] + x[:, 2:]) * middle).sum(1) / (2 * middle.square().sum(1))
    period = 0.5 * 2 * torch.pi / cosine.clamp(-1, 1).arccos()
    target = (period > 5 - 1e-2) & (period < 6 + 1e-2)
    assert torch.equal(target, targets == 0)


@pytest.mark.parametrize(("sampling_period", "steps"), [(1.0, 100), (0.5, 200)])
def test_frequency_lengths(sampling_period, steps):
    assert FrequencyDiscrimination(sampling_period).steps == steps


@pytest.mark.parametrize(("batch_size", "classes"), [(256, [128, 128]), (5, [2, 3])])
def test_frequency_batches_are_stratified(batch_size, classes):
    data = loaded(FrequencyDiscrimination(batch_size=batch_size, batches_per_epoch=3))
    assert len(data.training_batches(0)) == 3
    for batches in (data.training_batches(4), data.evaluation_batches("validation"), data.evaluation_batches("test")):
        assert all(targets.bincount().tolist() == classes for _, targets, _ in batches)


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_frequency_periods_are_uniform_outside_the_target_interval(low):
    data = FrequencyDiscrimination(low=low)
    targets = torch.tensor([0, 1]).repeat(50_000)
    target, other = data.periods(targets, seeded(0, "train")).view(-1, 2).unbind(1)
    assert target.min() >= 5
    assert target.max() < 6
    assert target.mean().item() == pytest.approx(5.5, abs=6 * (1 / 12 / 50_000) ** 0.5)
    assert other.min() > low
    assert other.max() <= 100
    assert not ((other > 5) & (other <= 6)).any()
    share = (5 - low) / (99 - low)  # of the periods, those below the target interval
    assert (other <= 5).double().mean().item() == pytest.approx(share, abs=6 * (share / 50_000) ** 0.5)
    mean = (5 + low) / 2 * share + 53 * (1 - share)
    assert other.mean().item() == pytest.approx(mean, abs=6 * (99**2 / 12 / 50_000) ** 0.5)


@pytest.mark.parametrize(("phase", "low", "high"), [("time", -1, 1), ("radians", -0.99985, 1)])
def test_frequency_phase_at_the_first_step(phase, low, high):
    """With a period near 3.16 ms, a shift of U(0, 3.16) radians is half a turn: x[0] = cos(shift) never comes back."""
    data = FrequencyDiscrimination(
        sampling_period=0.01, duration=0.02, target_low=3.1241, target_high=3.1242, phase=phase, batch_size=2000
    )
    inputs, targets, _ = data.draw(seeded(0, "train"))
    start, after = inputs[targets == 0, :, 0].unbind(1)
    assert start.min() >= low
    assert start.max() <= high
    falling = (after < start).double().mean()
    assert falling == (pytest.approx(0.5, abs=0.1) if phase == "time" else pytest.approx(1, abs=0.02))

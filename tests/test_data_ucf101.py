"""UCF-101: videos made for the purpose, stores filled by hand, and the published clips with their known features."""

import csv
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models import mobilenet_v2

from skiprnn.data.base import MIRROR, DataError
from skiprnn.data.ucf101 import UCF101, cnn_flops, group_of, read_list
from skiprnn.data.ucf101.__main__ import main
from skiprnn.data.ucf101.extract import convert, extract, load_backbone, sample_frames
from skiprnn.data.ucf101.store import FeatureStore, appending

PUBLISHED = Path(os.environ.get(MIRROR, ""), "ucf101")
needs_ucf101 = pytest.mark.skipif(
    not (PUBLISHED / "videos").is_dir(), reason=f"{MIRROR} names no folder with ucf101/videos/"
)
CPU = torch.device("cpu")
ORIGIN = {"backbone": "by hand", "weights": "none", "fps": 25, "seconds": 10, "width": 3, "dtype": "float16"}


def film(path: Path, greys: list[int], fps: int) -> Path:
    """A video whose frames are of one grey each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 1_000_000
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(video: Path) -> np.ndarray:
    return np.array([np.asarray(image, dtype=float).mean() for image in sample_frames(video)])


# decoding


@pytest.mark.parametrize(("fps", "frames", "expected"), [(25, 40, 40), (25, 251, 250), (50, 40, 20), (12, 12, 24)])
def test_frames_are_taken_at_25_per_second_for_10_seconds(tmp_path, fps, frames, expected):
    shades = [20 + 200 * index // frames for index in range(frames)]
    seen = greys(film(tmp_path / "film.avi", shades, fps))
    assert len(seen) == expected
    nearest = [min(range(frames), key=lambda index: (abs(index / fps - k / 25), index)) for k in range(expected)]
    assert np.abs(seen - np.array(shades)[nearest]).max() < 4  # what the codec does to a grey


@needs_ucf101
@pytest.mark.parametrize(
    ("clip", "frames"),
    [
        ("PushUps/v_PushUps_g16_c03", 33),  # 25 frames per second
        ("JumpingJack/v_JumpingJack_g04_c01", 45),  # 29.97, 54 in the file
        ("TrampolineJumping/v_TrampolineJumping_g01_c04", 89),  # 29.97, 106 in the file
        ("HandstandPushups/v_HandStandPushups_g22_c05", 50),  # B-frames: presentation stamps out of order
    ],
)
def test_known_clips_have_their_frames(clip, frames):
    assert len(sample_frames(PUBLISHED / "videos" / f"{clip}.avi")) == frames


def test_a_video_that_cannot_be_decoded_is_named(tmp_path):
    empty = tmp_path / "empty.avi"
    empty.touch()
    with pytest.raises(DataError, match=r"cannot decode .*empty\.avi"):
        sample_frames(empty)
    whole = film(tmp_path / "whole.avi", list(np.random.default_rng(0).integers(0, 255, 100)), 25)
    os.truncate(whole, whole.stat().st_size // 3)
    with pytest.raises(DataError, match=r"cannot decode .*whole\.avi: truncated, \d+ of 100 frames"):
        sample_frames(whole)


# the backbone


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of MobileNetV2's parameters as they are drawn, without those of the classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.safetensors"
    save_file({key: value for key, value in mobilenet_v2().state_dict().items() if "classifier" not in key}, path)
    return path


def test_features_are_the_global_average_pool(weights):
    torch.manual_seed(0)
    network = mobilenet_v2().eval()
    backbone = load_backbone("mobilenet_v2", str(weights), CPU)
    assert backbone.width == 1280
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        expected = network.features(images).mean((2, 3)).numpy()
    assert np.allclose(backbone.features(images, 2, CPU), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "complaint"),
    [
        ("resnet18", "mobilenet_v2.safetensors", r"mobilenet_v2\.safetensors are corrupt, or of another network"),
        ("mobilenet_v2", "text.safetensors", r"text\.safetensors are corrupt"),
        ("mobilenet_v2", "text.pth", r"text\.pth are corrupt"),
        ("mobilenet_v2", "absent.pth", r"absent\.pth' is neither a file nor one of .*IMAGENET1K_V1"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, name, file, complaint):
    for text in ("text.safetensors", "text.pth"):
        (weights.parent / text).write_text("no weights")
    with pytest.raises(DataError, match=complaint):
        load_backbone(name, str(weights.parent / file), CPU)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("resnet", "no classification network 'resnet'"), ("squeezenet1_0", "does not end in a linear")],
)
def test_a_backbone_that_does_not_serve_is_named(weights, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_backbone(name, str(weights), CPU)


# the feature store


def rows(first: int, frames: int) -> np.ndarray:
    """Features (frames, 3) that say which row they are."""
    return np.arange(first, first + frames)[:, None] + np.array([0, 0.25, 0.5])


def fill(folder: Path, clips: dict[str, int]) -> Path:
    """A store with clips "CLASS/name" of so many frames."""
    with appending(folder, ORIGIN) as writer:
        for clip, frames in clips.items():
            action, name = clip.split("/")
            writer.append(name, action, rows(writer.rows, frames))
    return folder


def test_a_store_gives_back_what_was_put_in(tmp_path):
    store = FeatureStore(fill(tmp_path / "store", {"A/a": 2, "B/b": 3}))
    assert [(clip.name, clip.action, clip.first_row, clip.frames) for clip in store.clips] == [
        ("a", "A", 0, 2),
        ("b", "B", 2, 3),
    ]
    assert store.origin == ORIGIN
    assert store.features.dtype == np.float16
    assert np.array_equal(store.features, rows(0, 5))
    assert isinstance(store.features, np.memmap)


@pytest.mark.parametrize(("file", "rest"), [("features.npy", b"\1\2\3\4\5"), ("index.csv", b"c,C,5")])
def test_a_writer_that_was_killed_leaves_a_whole_store(tmp_path, file, rest):
    """A part of a clip's rows, or of its line, is ignored by readers and overwritten by the next writer."""
    store = fill(tmp_path / "store", {"A/a": 2, "B/b": 3})
    with (store / file).open("ab") as open_file:
        open_file.write(rest)
    assert len(FeatureStore(store).clips) == 2
    fill(store, {"C/c": 4})
    straight = fill(tmp_path / "straight", {"A/a": 2, "B/b": 3, "C/c": 4})
    for name in ("features.npy", "index.csv", "store.json"):
        assert (store / name).read_bytes() == (straight / name).read_bytes()


def test_stores_that_do_not_serve_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no feature store in .*absent.*ucf101 extract"):
        FeatureStore(tmp_path / "absent")
    store = fill(tmp_path / "store", {"A/a": 20})
    with (
        pytest.raises(DataError, match=r"store have another origin: .*by hand.*resnet50"),
        appending(store, ORIGIN | {"backbone": "resnet50"}),
    ):
        pass
    with (
        appending(store, ORIGIN),
        pytest.raises(DataError, match="another process is writing to the feature store"),
        appending(store, ORIGIN),
    ):
        pass
    os.truncate(store / "features.npy", 200)
    with pytest.raises(DataError, match=r"feature store in .* is corrupt"):
        FeatureStore(store)
    (store / "index.csv").write_text("a,A,zero,20\n")
    with pytest.raises(DataError, match=r"feature store in .* is corrupt"):
        FeatureStore(store)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("features.npy", np.zeros((20, 3), np.int32)),
        ("features.npy", np.zeros((20, 0), np.float16)),
        ("features.npy", np.zeros((20, 3), "U4")),
        ("index.csv", "a,A,0,-3\n"),
        ("index.csv", "a,A,0,0\n"),
        ("store.json", "[]"),
    ],
)
def test_stores_of_another_kind_are_named(tmp_path, file, content):
    store = fill(tmp_path / "store", {"A/a": 20})
    np.save(store / file, content) if file == "features.npy" else (store / file).write_text(content)
    with pytest.raises(DataError, match=r"feature store in .* is corrupt .*; delete it and make it again"):
        FeatureStore(store)


# extracting and converting


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two classes, three clips, one of them of zero bytes."""
    folder = tmp_path / "UCF-101"
    film(folder / "Lunges" / "v_Lunges_g01_c01.avi", [0, 60, 120, 180, 240], 25)
    film(folder / "PullUps" / "v_PullUps_g01_c01.avi", [30, 90, 150], 25)
    (folder / "Lunges" / "v_Lunges_g01_c02.avi").touch()
    return folder


def test_extract_leaves_broken_videos_out_and_goes_on(tmp_path, videos, weights, capsys):
    store = tmp_path / "store"
    arguments = f"extract --videos {videos} --store {store} --backbone mobilenet_v2 --weights {weights} --device cpu"
    assert main([*arguments.split(), "--classes", "PullUps"]) == 0
    assert [clip.name for clip in FeatureStore(store).clips] == ["v_PullUps_g01_c01"]
    before = (store / "features.npy").read_bytes()
    assert main(arguments.split()) == 0
    said = capsys.readouterr()
    assert "v_Lunges_g01_c02.avi" in said.err
    assert "2 clips of 2 classes; 1 videos left out" in said.out
    result = FeatureStore(store)
    assert [(clip.name, clip.frames) for clip in result.clips] == [("v_PullUps_g01_c01", 3), ("v_Lunges_g01_c01", 5)]
    header = 128
    assert (store / "features.npy").read_bytes()[header : len(before)] == before[header:]
    (videos / "Lunges" / "v_Lunges_g01_c02.avi").unlink()
    for video in videos.glob("*/*.avi"):
        video.write_bytes(b"")  # what is stored is not decoded again
    assert extract(videos, store, "mobilenet_v2", str(weights), device="cpu") == []


def test_extracted_features_are_those_of_the_frames(tmp_path, videos, weights):
    extract(videos, tmp_path / "store", "mobilenet_v2", str(weights), ["PullUps"], "float32", "cpu", batch_size=2)
    torch.manual_seed(0)
    network = mobilenet_v2().eval()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # resizing and cropping leave an image of one grey as it is
    shades = torch.from_numpy(greys(videos / "PullUps" / "v_PullUps_g01_c01.avi")).float() / 255
    images = ((shades.view(-1, 1) - mean) / deviation).view(3, 3, 1, 1).expand(3, 3, 224, 224)
    with torch.inference_mode():
        expected = network.features(images).mean((2, 3)).numpy()
    features = FeatureStore(tmp_path / "store").features
    assert np.abs(features - expected).max() < 0.05 * np.abs(expected).max()


def test_extract_keeps_a_name_with_a_comma_and_leaves_out_one_of_two_lines(tmp_path, weights, capsys):
    names = ['v_one, "two"_g01_c01', "v_two\nlines_g01_c01", "v_last_g01_c01"]
    for name in names:
        film(tmp_path / "videos" / "a, b" / f"{name}.avi", [30, 90, 150], 25)
    store, given = tmp_path / "store", ["--backbone", "mobilenet_v2", "--weights", str(weights), "--device", "cpu"]
    for _ in range(2):  # the second time, what is stored is read
        assert main(["extract", "--videos", str(tmp_path / "videos"), "--store", str(store), *given]) == 0
        said = capsys.readouterr()
        assert "left out: 'v_two\\nlines_g01_c01'" in said.err
        assert "2 clips of 1 classes; 1 videos left out" in said.out
    clips = FeatureStore(store).clips
    assert [(clip.name, clip.action) for clip in clips] == [
        (name, "a, b") for name in sorted(names) if "\n" not in name
    ]


def test_extract_without_videos_says_so(tmp_path, videos, weights, capsys):
    arguments = ["--store", str(tmp_path / "store"), "--backbone", "mobilenet_v2", "--weights", str(weights)]
    assert main(["extract", "--videos", str(tmp_path / "absent"), *arguments]) == 1
    assert main(["extract", "--videos", str(videos), "--classes", "Archery", *arguments]) == 1
    assert capsys.readouterr().err.count("error: no videos") == 2


def eight_bit(folder: Path) -> Path:
    """Two clips, of 3 and 2 frames, cut into files in the middle of the first."""
    folder.mkdir()
    x = np.arange(15, dtype=np.uint8).reshape(5, 3)
    np.savez(folder / "features_u8_0.npz", x=x[:2])
    np.savez(folder / "features_u8_1.npz", x=x[2:])
    np.save(folder / "scale.npy", np.array([1, 0.5, 0.25], dtype=np.float32))
    (folder / "clips.csv").write_text("clip,class,label,first_row,frames\nv_A_g01_c01,A,1,0,3\nv_B_g08_c01,B,2,3,2\n")
    return folder


def test_convert_scales_8_bit_features(tmp_path):
    store = tmp_path / "store"
    convert(eight_bit(tmp_path / "features"), store)
    convert(tmp_path / "features", store)  # nothing is left to do
    result = FeatureStore(store)
    assert [(clip.name, clip.action, clip.frames) for clip in result.clips] == [
        ("v_A_g01_c01", "A", 3),
        ("v_B_g08_c01", "B", 2),
    ]
    assert result.features[4].tolist() == [12, 6.5, 3.5]


@pytest.mark.parametrize("file", ["features_u8_1.npz", "scale.npy", "clips.csv"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 30)])
def test_damaged_8_bit_features_are_named(tmp_path, file, damage):
    damage(eight_bit(tmp_path / "features") / file)
    with pytest.raises(DataError, match=r"8-bit features in .*features are incomplete or corrupt"):
        convert(tmp_path / "features", tmp_path / "store")


@pytest.mark.parametrize("line", ["v_A,A,1,-1,3", "v_A,A,1,0,-3", '"a,b",A,1,0,3', "v_A,../A,1,0,3", "v_A,A,1,0,9"])
def test_clips_that_are_none_are_not_converted(tmp_path, line):
    (eight_bit(tmp_path / "features") / "clips.csv").write_text(f"clip,class,label,first_row,frames\n{line}\n")
    with pytest.raises(DataError, match=r"8-bit features in .*features are incomplete or corrupt"):
        convert(tmp_path / "features", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("scale", [np.full(3, np.nan), np.array(["a", "b", "c"])])
def test_a_scale_that_is_none_is_named(tmp_path, scale):
    np.save(eight_bit(tmp_path / "features") / "scale.npy", scale)
    with pytest.raises(DataError, match=r"8-bit features in .*features are incomplete or corrupt"):
        convert(tmp_path / "features", tmp_path / "store")


@needs_ucf101
def test_extracting_a_clip_agrees_with_its_published_features(tmp_path):
    """The same frames, preprocessing and network: what differs is the rounding to 8 bits, half a level."""
    video, weights = "PushUps/v_PushUps_g16_c03.avi", PUBLISHED / "mobilenet_v2_imagenet_features.safetensors"
    link = tmp_path / "videos" / video
    link.parent.mkdir(parents=True)
    link.symlink_to((PUBLISHED / "videos" / video).resolve())
    extract(tmp_path / "videos", tmp_path / "store", "mobilenet_v2", str(weights), dtype="float32", device="cpu")
    with (PUBLISHED / "features" / "clips.csv").open(newline="") as table:
        clip = next(row for row in csv.DictReader(table) if row["clip"] == link.stem)
    scale = np.load(PUBLISHED / "features" / "scale.npy")
    first = int(clip["first_row"])
    parts = [np.load(path)["x"] for path in sorted((PUBLISHED / "features").glob("features_u8_*.npz"))]
    published = np.concatenate(parts)[first : first + int(clip["frames"])] * scale
    features = FeatureStore(tmp_path / "store").features
    assert features.shape == published.shape == (33, 1280)
    assert (np.abs(features - published) / scale).max() < 0.501


@pytest.mark.slow
@needs_ucf101
def test_published_features_classify_as_published(tmp_path, monkeypatch):
    """Logistic regression on each clip's mean feature: the data's README has 65.1 % on the 212 test clips."""
    monkeypatch.setenv(MIRROR, str(PUBLISHED.parent))
    convert(PUBLISHED / "features", tmp_path / "ucf101" / "store")
    data = loaded(tmp_path, allow_missing=True)
    assert data.examples["train"] + data.examples["validation"] == 528
    assert data.examples["test"] == 212
    stored = data.features.features
    means = {
        part: [stored[clip.first_row :][: clip.frames].astype(np.float32).mean(0) for clip in clips]
        for part, clips in data.clips.items()
    }
    actions = {part: [clip.action for clip in clips] for part, clips in data.clips.items()}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    model.fit(means["train"] + means["validation"], actions["train"] + actions["validation"])
    assert model.score(means["test"], actions["test"]) == pytest.approx(0.651, abs=0.02)


# the data set


TRAIN = [f"{action}/v_{action}_g{group:02}_c01" for action in ("Lunges", "PullUps") for group in range(8, 13)]
TEST = [f"{action}/v_{action}_g{group:02}_c01" for action in ("Lunges", "PullUps") for group in (1, 2)]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Lists that name three classes, and a store with two of them; clips of 1, 2, 3... frames."""
    monkeypatch.delenv(MIRROR, raising=False)
    folder = tmp_path / "ucf101"
    fill(folder / "store", {clip: frames for frames, clip in enumerate([*TEST, *TRAIN], start=1)})
    lines = [f"{clip}.avi {71 if 'PullUps' in clip else 52}\r\n" for clip in [*TRAIN, "Archery/v_Archery_g08_c01"]]
    (folder / "trainlist01.txt").write_bytes("".join(lines).encode())
    (folder / "testlist01.txt").write_bytes("".join(f"{clip}.avi\r\n" for clip in TEST).encode())
    return tmp_path


def loaded(root: Path, **settings) -> UCF101:
    data = UCF101(root=str(root), **settings)
    data.prepare()
    data.load("cpu")
    return data


def test_ucf101_splits_follow_the_lists_and_hold_out_whole_groups(root):
    data = loaded(root, validation_groups=2)
    assert (data.input_size, data.steps, data.outputs, data.task) == (3, 250, 2, "classification")
    assert data.classes == ["Lunges", "PullUps"]
    assert data.examples == {"train": 6, "validation": 4, "test": 4}
    groups = {name: {group_of(clip.name) for clip in clips} for name, clips in data.clips.items()}
    assert groups == {"train": {8, 9, 10}, "validation": {11, 12}, "test": {1, 2}}
    ((_, targets, _),) = data.evaluation_batches("test")
    assert targets.tolist() == [0, 0, 1, 1]


def test_what_a_frame_costs_is_of_the_backbone_in_the_store(root):
    assert cnn_flops("mobilenet_v2") == pytest.approx(3.0e8, rel=0.01)  # Sandler et al. (2018), Table 4: 300M
    assert loaded(root).input_flops is None  # made by hand
    assert loaded(root).note == "2 of 101 classes, 14 clips, features by by hand"
    store = root / "ucf101" / "store" / "store.json"
    store.write_text(store.read_text().replace("by hand", "resnet50"))
    assert loaded(root).input_flops == 3.8e9
    assert loaded(root).note.endswith("14 clips, features by resnet50 (3.8e9 multiplications for each frame used)")


def test_ucf101_batches_are_the_clips_features_cropped_and_padded(root):
    data = loaded(root, frames=3, mask_padding=True)
    ((inputs, _, lengths),) = data.evaluation_batches("test")  # clips of 1, 2, 3 and 4 frames, from row 0
    assert inputs.shape == (4, 3, 3)
    assert inputs.dtype == torch.float32
    assert lengths.tolist() == [1, 2, 3, 3]
    assert inputs[:, :, 0].tolist() == [[0, 0, 0], [1, 2, 0], [3, 4, 5], [6, 7, 8]]
    assert inputs[1, 1].tolist() == [2, 2.25, 2.5]
    assert loaded(root).evaluation_batches("test").__iter__().__next__()[2] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_nan_are_said_and_not_trained_on(root, value):
    features = np.load(root / "ucf101" / "store" / "features.npy", mmap_mode="r+")
    features[4, 1] = value  # of the third test clip
    features.flush()
    data = loaded(root, frames=3)
    with pytest.raises(DataError, match=r"^the feature store holds nan or inf for v_\w+, row 3: delete the store"):
        list(data.evaluation_batches("test"))


@pytest.mark.parametrize("backbone", [None, "maskrcnn_resnet50_fpn", "nothing", "__class__"])
def test_what_a_store_says_of_its_backbone_is_only_told(root, backbone):
    file = root / "ucf101" / "store" / "store.json"
    origin = {key: value for key, value in json.loads(file.read_text()).items() if key != "backbone"}
    file.write_text(json.dumps(origin | ({"backbone": backbone} if backbone else {})))
    assert loaded(root).input_flops is None


def test_ucf101_training_shuffles_clips_with_their_targets(root):
    data = loaded(root, batch_size=4)
    orders = []
    for epoch in range(3):
        batches = list(data.training_batches(epoch))
        assert [len(targets) for _, targets, _ in batches] == [4, 2]
        firsts = {clip.first_row: data.classes.index(clip.action) for clip in data.clips["train"]}
        order = [(int(x[0, 0]), int(y)) for inputs, targets, _ in batches for x, y in zip(inputs, targets, strict=True)]
        assert dict(order) == firsts
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def test_a_list_naming_an_absent_video_is_an_error_unless_allowed(root):
    path = root / "ucf101" / "testlist01.txt"
    path.write_text(path.read_text() + "PullUps/v_PullUps_g03_c01.avi\n")
    with pytest.raises(
        DataError, match=r"testlist01\.txt names 1 clips .* first PullUps/v_PullUps_g03_c01.*allow_missing"
    ):
        loaded(root)
    assert loaded(root, allow_missing=True).examples["test"] == 4


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("PullUps v_PullUps_g01_c01\n", r"testlist01\.txt, line 1: not CLASS/VIDEO\.avi"),
        ("Archery/v_Archery_g01_c01.avi\n", "has none of the clips that .*testlist01"),
        ("\xff\xfe\x00", r"testlist01\.txt, line 1: not CLASS/VIDEO\.avi"),
        ("", "has none of the clips that .*testlist01"),
    ],
)
def test_lists_that_do_not_serve_are_named(root, content, complaint):
    (root / "ucf101" / "testlist01.txt").write_text(content, "latin-1")
    with pytest.raises(DataError, match=complaint):
        loaded(root)


def test_missing_lists_are_named_with_the_ways_out(root):
    with pytest.raises(DataError, match=f"cannot get ucf101/trainlist02.txt: unpack https://.*, or set {MIRROR}"):
        loaded(root, split=2)


@needs_ucf101
def test_the_official_lists():
    train, test = (read_list(PUBLISHED / f"{part}list01.txt") for part in ("train", "test"))
    assert (len(train), len(test)) == (9537, 3783)
    assert len({action for action, _ in train}) == 101
    assert {group_of(name) for _, name in train} == set(range(8, 26))
    assert {group_of(name) for _, name in test} == set(range(1, 8))

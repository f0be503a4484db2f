"""UCF-101: which action does a video show? (Soomro et al. 2012; [SKIP] section 4.4)

Two stages. A frozen convolutional network turns frames into features, once; they are kept in a feature store:

    python -m skiprnn.data.ucf101 extract --videos UCF-101 --store data/ucf101/store
    python -m skiprnn.data.ucf101 convert --features FOLDER --store data/ucf101/store

The second takes features that were stored as 8-bit numbers (see `convert`). Both go on where they were stopped.
Training then reads the store by memory mapping, whatever its size.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import pickle
import re
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from rich.progress import track
from torch import Tensor, nn

from skiprnn.data.base import Batch, DataError, Source, StoredData, fetch, replacing

FPS, SECONDS = 25, 10
FRAMES = FPS * SECONDS
LISTS = "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"
GROUP = re.compile(r"_g(\d+)_c\d+$")  # clips of a group come from one video


# --- the feature store ---


@dataclass(frozen=True)
class Clip:
    """Where a clip's features are in the store."""

    name: str  # of the video file, without suffix: "v_PullUps_g07_c04"
    action: str  # its class, which is its folder: "PullUps"
    first_row: int
    frames: int


class FeatureStore:
    """Features of many clips, frame by frame, in a folder of three files.

    - `features.npy`: (rows, F) float16 or float32, the frames of all clips one after another.
    - `index.csv`: clip, class, first_row, frames; a clip counts from the moment its line is complete.
    - `store.json`: where the features come from (backbone, weights, frames per second, width, dtype).

    Raises:
        DataError: there is no store in the folder, or it is corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.origin: dict[str, str | int] = json.loads((folder / "store.json").read_text("utf-8"))
            self.clips = read_index(folder / "index.csv")
            self.features = np.load(folder / "features.npy", mmap_mode="r")
        except FileNotFoundError as error:
            raise DataError(
                f"no feature store in {folder} ({error.filename} is missing); make it with "
                "python -m skiprnn.data.ucf101 extract (from videos) or convert (from 8-bit features)"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(
                f"the feature store in {folder} is corrupt ({error}); delete it and make it again"
            ) from error
        rows = sum(clip.frames for clip in self.clips)
        if len(self.features) < rows:
            raise DataError(
                f"{folder / 'features.npy'} is truncated: {len(self.features)} rows instead of {rows}; "
                "delete the store and make it again"
            )

    @property
    def width(self) -> int:
        """F, features per frame."""
        return self.features.shape[1]


def read_index(path: Path) -> list[Clip]:
    """The clips of an index whose lines are complete, in order.

    Raises:
        ValueError: a line that is no clip, or whose rows do not follow those before.
    """
    clips: list[Clip] = []
    rows = 0
    for line in csv.reader(line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")):
        name, action, first_row, frames = line
        clips.append(Clip(name, action, int(first_row), int(frames)))
        if clips[-1].first_row != rows:
            raise ValueError(f"{path}: {name} starts at row {first_row}, not {rows}")
        rows += clips[-1].frames
    return clips


class StoreWriter:
    """Appends clips to a store, so that it is whole and readable after every one of them, even if then killed."""

    def __init__(self, features: BinaryIO, index: BinaryIO, clips: list[Clip], width: int, dtype: np.dtype):
        self.features, self.index, self.width, self.dtype = features, index, width, dtype
        self.names = {clip.name for clip in clips}
        self.rows = sum(clip.frames for clip in clips)
        # a writer that was killed may have left a part of a clip, or of a line, behind
        index.truncate(sum(len(line) for line in index.read().splitlines(keepends=True) if line.endswith(b"\n")))
        write_header(features, self.rows, width, dtype)
        features.truncate(features.tell() + self.rows * width * dtype.itemsize)

    def append(self, name: str, action: str, features: np.ndarray) -> None:
        """Add the features (frames, F) of a clip."""
        self.features.seek(0, 2)
        self.features.write(np.ascontiguousarray(features, dtype=self.dtype).tobytes())
        line = f"{name},{action},{self.rows},{len(features)}\n"
        self.rows += len(features)
        write_header(self.features, self.rows, self.width, self.dtype)
        self.index.seek(0, 2)
        self.index.write(line.encode())  # last, and only then does the clip count
        self.index.flush()
        self.names.add(name)


def write_header(file: BinaryIO, rows: int, width: int, dtype: np.dtype) -> None:
    """(Over)write the header of an .npy file, which numpy pads so that it has the same size for any number of rows."""
    file.seek(0)
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, width)}
    npy.write_array_header_1_0(file, header)
    file.flush()


@contextmanager
def appending(folder: Path, origin: dict[str, str | int]) -> Iterator[StoreWriter]:
    """A writer for the store in a folder, which is created when needed.

    Args:
        folder: of the store.
        origin: where the features come from; among it "width" and "dtype".

    Raises:
        DataError: the store there is corrupt, of another origin, or another process is writing to it.
    """
    if not (folder / "store.json").exists():
        with replacing(folder / "store.json") as temporary:
            temporary.write_text(json.dumps(origin, indent=2) + "\n")
    for name in ("features.npy", "index.csv"):
        (folder / name).touch()
    with (folder / "features.npy").open("r+b") as features, (folder / "index.csv").open("r+b") as index:
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is writing to the feature store in {folder}") from error
        width, dtype = int(origin["width"]), np.dtype(str(origin["dtype"]))
        if not features.seek(0, 2):
            write_header(features, 0, width, dtype)
        store = FeatureStore(folder)
        if store.origin != origin:
            raise DataError(f"the features in {folder} have another origin: {store.origin}, not {origin}")
        yield StoreWriter(features, index, store.clips, width, dtype)


# --- from videos to features ---


def sample_frames(video: Path) -> list:
    """The frames of a video's first 10 seconds at 25 per second, as PIL images.

    Each instant k/25 s takes the frame nearest in time; a frame stands for half a period on either side, so the last
    one decides how many instants there are. Frames are taken in decoding order and timed by their decoding time stamp:
    AVI files with B-frames have none other that is right.

    Raises:
        DataError: the video cannot be decoded.
    """
    import av  # here, for training needs no decoder

    frames, times = [], []
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            tick, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
            stamp = -1
            for frame in container.decode(stream):
                # the decoder's last frames may come without a stamp: they follow at the stream's rate
                stamp = frame.dts if frame.dts is not None else stamp + round(1 / (rate * tick))
                times.append(stamp * tick)
                frames.append(frame)
                if times[-1] - times[0] > SECONDS:
                    break
            else:
                if not frames or stream.frames - len(frames) > rate:  # more than a second is lacking
                    raise ValueError(f"truncated, {len(frames)} of {stream.frames} frames are there")
    except (av.FFmpegError, OSError, IndexError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"cannot decode {video}: {error}") from error
    since = np.array(times) - times[0]
    instants = np.arange(FRAMES) / FPS
    instants = instants[instants < since[-1] + 0.5 / rate]
    nearest = np.abs(instants[:, None] - since).argmin(1)
    return [frames[index].to_image() for index in nearest]


@dataclass(frozen=True)
class Backbone:
    """A frozen network that turns images into features."""

    network: nn.Module  # (B, 3, height, width) -> (B, F)
    transform: Callable  # PIL image -> (3, height, width)
    width: int  # F
    origin: dict[str, str | int]  # name and weights

    def read(self, video: Path) -> Tensor:
        """A video's frames as the network wants them, (frames, 3, height, width)."""
        return torch.stack([self.transform(image) for image in sample_frames(video)])

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int, device: torch.device) -> np.ndarray:
        """(frames, F) float32."""
        return torch.cat([self.network(batch.to(device)).cpu() for batch in images.split(batch_size)]).numpy()


def load_backbone(name: str, weights: str, device: torch.device) -> Backbone:
    """A torchvision classification network without its last linear layer, whose inputs are the features.

    For ResNet-50 these are the global average pool's 2048 outputs, as in the paper.

    Args:
        name: as in torchvision.models.list_models.
        weights: the name of torchvision's weights, downloaded when needed; or a .safetensors or torch file of the
            network's parameters, with or without those of the last layer.
        device: where to compute.

    Raises:
        DataError: the weights cannot be had or do not fit the network.
        ValueError: no such network, or one without a linear layer at its end.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classification network {name!r}; resnet50 is the paper's")
    published = models.get_model_weights(name)
    file = Path(weights)
    is_file = file.is_file()
    if not is_file and weights not in published.__members__:
        raise DataError(f"weights of {name}: {weights!r} is neither a file nor one of {[*published.__members__]}")
    chosen = published["IMAGENET1K_V1"] if is_file else published[weights]
    try:
        network = models.get_model(name, weights=None if is_file else chosen)
    except (OSError, RuntimeError) as error:  # no network, or a file of another checksum
        raise DataError(
            f"cannot download {chosen.url}: {error}; connect to the internet, or name a file of weights"
        ) from error
    linear = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(f"{name} does not end in a linear layer, so it is not clear what its features are")
    head, layer = linear[-1]
    network.set_submodule(head, nn.Identity())
    source = weights
    if is_file:
        load_parameters(network, file, ignore=head)
        with file.open("rb") as content:
            source = f"{file.name}, SHA-256 {hashlib.file_digest(content, 'sha256').hexdigest()}"
    origin: dict[str, str | int] = {"backbone": name, "weights": source}
    return Backbone(network.eval().to(device), chosen.transforms(), layer.in_features, origin)


def load_parameters(network: nn.Module, file: Path, ignore: str) -> None:
    """Fill a network from a file, whose entries under the name `ignore` are left out.

    Raises:
        DataError: the file is corrupt or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        is_safe = file.suffix == ".safetensors"
        state = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith(f"{ignore}.")})
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        ValueError,
        EOFError,
        AttributeError,
    ) as error:
        raise DataError(f"the weights in {file} are corrupt, or of another network: {error}") from error


def extract(
    videos: Path,
    store: Path,
    backbone: str = "resnet50",
    weights: str = "IMAGENET1K_V1",
    classes: Sequence[str] = (),
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 2,
) -> list[DataError]:
    """Features of all videos `videos/CLASS/*.avi` that the store does not have yet.

    Args:
        videos: the unpacked UCF-101 folder.
        store: folder of the feature store.
        backbone, weights: see load_backbone.
        classes: only these; all if empty.
        dtype: of the stored features.
        device: "auto" is the GPU if there is one.
        batch_size: frames at a time.
        workers: threads that decode videos ahead of the network; each holds one video, up to 150 MB.

    Returns:
        What was wrong with the videos that could not be read, which were left out.

    Raises:
        DataError: no videos, a class without videos, weights or a store that do not fit.
    """
    found = sorted(videos.glob("*/*.avi"))
    absent = sorted(set(classes) - {video.parent.name for video in found})
    if not found or absent:
        raise DataError(f"no videos {videos}/{absent[0] if absent else 'CLASS'}/*.avi")
    chosen = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    network = load_backbone(backbone, weights, chosen)
    origin = network.origin | {"fps": FPS, "seconds": SECONDS, "width": network.width, "dtype": dtype}
    broken = []
    with appending(store, origin) as writer, ThreadPoolExecutor(workers) as pool:
        wanted = [video for video in found if not classes or video.parent.name in classes]
        missing = [video for video in wanted if video.stem not in writer.names]
        frames = ahead(pool, network.read, missing, workers)
        for video, future in track(frames, f"{len(missing)} of {len(wanted)} videos", total=len(missing)):
            try:
                images = future.result()
            except DataError as error:
                broken.append(error)
                continue
            writer.append(video.stem, video.parent.name, network.features(images, batch_size, chosen))
    return broken


def ahead(pool: Executor, work: Callable, items: Sequence[Path], count: int) -> Iterator[tuple[Path, Future]]:
    """Every item with its result to come, in order, while the next `count` are worked on, no more for memory's sake."""
    pending: deque[tuple[Path, Future]] = deque()
    for item in items:
        pending.append((item, pool.submit(work, item)))
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


def convert(features: Path, store: Path, backbone: str = "mobilenet_v2", dtype: str = "float16") -> None:
    """A feature store from 8-bit features, clip by clip as far as the store does not have them.

    Args:
        features: folder with `features_u8_*.npz` (key x, uint8 (rows, F), in the order of their numbers), `scale.npy`
            (F,) and `clips.csv` (columns clip, class, first_row, frames): feature = x * scale.
        store: folder of the feature store.
        backbone: the network that the features are of.
        dtype: of the stored features.

    Raises:
        DataError: a file is missing or corrupt, or the store is of another origin.
    """
    try:
        with (features / "clips.csv").open(encoding="utf-8", newline="") as table:
            clips = [
                (row["clip"], row["class"], int(row["first_row"]), int(row["frames"])) for row in csv.DictReader(table)
            ]
        scale = np.load(features / "scale.npy")
        parts = []
        for path in sorted(features.glob("features_u8_*.npz"), key=lambda path: int(path.stem.rpartition("_")[2])):
            with np.load(path) as part:
                parts.append(part["x"])
        rows = np.concatenate(parts)
        needed = max(first + frames for _, _, first, frames in clips)
        if len(rows) < needed or rows.shape[1:] != scale.shape:
            raise ValueError(f"features {rows.shape} for {needed} rows and a scale of {scale.shape}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"the 8-bit features in {features} are incomplete or corrupt: {error}") from error
    origin: dict[str, str | int] = {"backbone": backbone, "weights": "converted from 8-bit features"}
    origin |= {"fps": FPS, "seconds": SECONDS, "width": len(scale), "dtype": dtype}
    with appending(store, origin) as writer:
        for name, action, first, frames in track(clips, f"{len(clips)} clips"):
            if name not in writer.names:
                writer.append(name, action, rows[first : first + frames] * scale)


# --- the data set ---


@dataclass(frozen=True)
class MappedClips:
    """Clips whose features stay on disk until a batch takes them."""

    features: np.ndarray  # (rows, F), memory-mapped
    clips: Sequence[Clip]
    targets: Tensor  # (N,) int64
    steps: int
    mask_padding: bool
    device: torch.device

    def to(self, device: torch.device | str) -> "MappedClips":
        device = torch.device(device)
        return MappedClips(self.features, self.clips, self.targets.to(device), self.steps, self.mask_padding, device)

    def take(self, rows: Tensor) -> Batch:
        clips = [self.clips[row] for row in rows.tolist()]
        inputs = np.zeros((len(clips), self.steps, self.features.shape[1]), dtype=self.features.dtype)
        for padded, clip in zip(inputs, clips, strict=True):
            frames = min(clip.frames, self.steps)
            padded[:frames] = self.features[clip.first_row : clip.first_row + frames]
        lengths = torch.tensor([min(clip.frames, self.steps) for clip in clips], device=self.device)
        return (
            torch.from_numpy(inputs).to(self.device).float(),
            self.targets.index_select(0, rows),
            lengths if self.mask_padding else None,
        )


class UCF101(StoredData):
    """Features of 250 frames (10 s at 25 per second), (B, 250, F); the classes that the store has, at most 101.

    Longer clips are cropped, shorter ones padded with frames of zeros. Training and test clips are those of the
    official lists, which are looked for in `root/ucf101/` and below SKIPRNN_MIRROR. Validation is some of the groups
    of the training list: clips of a group come from one video, so they must not be on both sides.

    `input_size`, `outputs`, `classes` and `examples` follow from the store, and are known after prepare.

    Args:
        split: 1, 2 or 3, the official split; the paper has 1.
        store: folder of the feature store below root, or its full path.
        frames: T, at most 250.
        validation_groups: how many of the training list's groups (the last ones) are held out for validation.
        mask_padding: give the lengths, so that the model stops at the padding; otherwise padded steps count like all
            others, as in the paper.
        allow_missing: train although the store lacks clips of its own classes that the lists name.
        batch_size, seed, root, drop_last: see SequenceData.

    Raises:
        ValueError: an argument out of its range.
    """

    task = "classification"
    classes: list[str]  # in the order of their targets, which is alphabetical, as in the official list

    def __init__(
        self,
        split: int = 1,
        store: str = "ucf101/store",
        frames: int = FRAMES,
        validation_groups: int = 2,
        mask_padding: bool = False,
        allow_missing: bool = False,
        batch_size: int = 256,
        seed: int = 0,
        root: str = "data",
        drop_last: bool = False,
    ):
        super().__init__(batch_size, seed, root, drop_last)
        if split not in (1, 2, 3):
            raise ValueError(f"split must be 1, 2 or 3; got {split}")
        if not 1 <= frames <= FRAMES:
            raise ValueError(f"frames must be from 1 to {FRAMES}; got {frames}")
        if validation_groups < 1:
            raise ValueError(f"validation_groups must be at least 1; got {validation_groups}")
        self.split, self.store, self.steps, self.validation_groups = split, store, frames, validation_groups
        self.mask_padding, self.allow_missing = mask_padding, allow_missing

    def settings(self) -> tuple:
        return self.split, self.store, self.steps, self.validation_groups, self.mask_padding, tuple(self.clips)

    def prepare(self) -> None:
        self.features = FeatureStore(self.root / self.store)
        self.input_size = self.features.width
        self.classes = sorted({clip.action for clip in self.features.clips})
        self.outputs = len(self.classes)
        train, test = (self._listed(part) for part in ("train", "test"))
        groups = sorted({group_of(clip.name) for clip in train})
        if len(groups) <= self.validation_groups:
            raise DataError(
                f"{len(groups)} groups of training clips leave none after {self.validation_groups} for validation"
            )
        held_out = set(groups[-self.validation_groups :])
        self.clips = {
            "train": [clip for clip in train if group_of(clip.name) not in held_out],
            "validation": [clip for clip in train if group_of(clip.name) in held_out],
            "test": test,
        }
        self.examples = {name: len(clips) for name, clips in self.clips.items()}

    def _listed(self, part: str) -> list[Clip]:
        """The stored clips that a list of the official split names, in its order."""
        path = fetch(
            self.root,
            Source(f"ucf101/{part}list{self.split:02}.txt"),
            advice=f"unpack {LISTS} and put its lists there",
        )
        stored = {clip.name: clip for clip in self.features.clips}
        named = [(action, name) for action, name in read_list(path) if action in self.classes]
        absent = [f"{action}/{name}" for action, name in named if name not in stored]
        if absent and not self.allow_missing:
            raise DataError(
                f"{path} names {len(absent)} clips that the feature store lacks, the first {absent[0]}: extract them, "
                "or set allow_missing=true to do without"
            )
        clips = [stored[name] for _, name in named if name in stored]
        if not clips:
            raise DataError(f"the feature store in {self.features.folder} has none of the clips that {path} names")
        return clips

    def read(self) -> dict[str, MappedClips]:
        return {
            name: MappedClips(
                self.features.features,
                clips,
                torch.tensor([self.classes.index(clip.action) for clip in clips]),
                self.steps,
                self.mask_padding,
                torch.device("cpu"),
            )
            for name, clips in self.clips.items()
        }


def read_list(path: Path) -> list[tuple[str, str]]:
    """(class, clip) of every line of an official list: "PullUps/v_PullUps_g08_c01.avi 70", the number being optional.

    Raises:
        DataError: a line that names no video.
    """
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        match = re.fullmatch(r"(\w+)/(\w+)\.avi(?:\s+\d+)?\s*", line)
        if match:
            entries.append((match[1], match[2]))
        elif line.strip():
            raise DataError(f"{path}, line {number}: not CLASS/VIDEO.avi but {line.strip()!r}")
    return entries


def group_of(name: str) -> int:
    """The group in a clip's name: 8 for v_PullUps_g08_c01.

    Raises:
        DataError: the name has none.
    """
    match = GROUP.search(name)
    if not match:
        raise DataError(f"the clip {name} is not named like UCF-101's, v_CLASS_g00_c00")
    return int(match[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m skiprnn.data.ucf101", description="Make a UCF-101 feature store.")
    commands = parser.add_subparsers(dest="command", required=True)
    parse = commands.add_parser("extract", help="decode videos and run a frozen network on their frames")
    parse.add_argument("--videos", type=Path, required=True, help="folder that holds CLASS/*.avi")
    parse.add_argument("--store", type=Path, required=True, help="folder of the feature store")
    parse.add_argument("--backbone", default="resnet50", help="a torchvision classification network (%(default)s)")
    parse.add_argument("--weights", default="IMAGENET1K_V1", help="torchvision's name, or a file (%(default)s)")
    parse.add_argument("--classes", nargs="+", default=[], help="only these")
    parse.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parse.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parse.add_argument("--batch-size", type=int, default=32, help="frames at a time (%(default)s)")
    parse.add_argument("--workers", type=int, default=2, help="threads that decode (%(default)s)")
    parse = commands.add_parser("convert", help="take features that were stored as 8-bit numbers")
    parse.add_argument(
        "--features", type=Path, required=True, help="folder with clips.csv, scale.npy, features_u8_*.npz"
    )
    parse.add_argument("--store", type=Path, required=True, help="folder of the feature store")
    parse.add_argument("--backbone", default="mobilenet_v2", help="the network that they are of (%(default)s)")
    parse.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    broken: list[DataError] = []
    try:
        if command == "extract":
            broken = extract(**options)
        else:
            convert(**options)
        store = FeatureStore(options["store"])
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in broken:
        print(f"left out: {reason}", file=sys.stderr)
    classes = len({clip.action for clip in store.clips})
    print(f"{store.folder}: {len(store.clips)} clips of {classes} classes; {len(broken)} videos left out")
    return 0 if store.clips else 1


if __name__ == "__main__":
    sys.exit(main())

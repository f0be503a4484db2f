"""Filling the feature store: from videos by a frozen convolutional network, or from features kept as 8-bit numbers."""

import csv
import hashlib
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from skiprnn.data.base import DataError, read_npz
from skiprnn.data.ucf101.store import FPS, FRAMES, SECONDS, appending


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
        DataError: no decoder, no videos, a class without videos, weights or a store that do not fit.
    """
    if not find_spec("av"):
        raise DataError("decoding videos needs av: pip install 'skiprnn[video]'")
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
                features = network.features(future.result(), batch_size, chosen)
                writer.append(video.stem, video.parent.name, features)
            except DataError as error:
                broken.append(error)
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
        scale = np.array(np.load(features / "scale.npy", mmap_mode="r"))
        parts = []
        for path in sorted(features.glob("features_u8_*.npz"), key=lambda path: int(path.stem.rpartition("_")[2])):
            parts += read_npz(path, "x")
        rows = np.concatenate(parts)
        needed = max(first + frames for _, _, first, frames in clips)
        if len(rows) < needed or rows.shape[1:] != scale.shape:
            raise ValueError(f"features {rows.shape} for {needed} rows and a scale of {scale.shape}")
        if not np.isfinite(scale).all():
            raise ValueError("the scale is nan or infinite")
        for name, action, first, frames in clips:
            if not (name.isidentifier() and action.isidentifier() and first >= 0 and frames >= 1):
                raise ValueError(f"clips.csv has {frames} frames from row {first} of {action!r}, {name!r}")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the 8-bit features in {features} are incomplete or corrupt: {error}") from error
    origin: dict[str, str | int] = {"backbone": backbone, "weights": "converted from 8-bit features"}
    origin |= {"fps": FPS, "seconds": SECONDS, "width": len(scale), "dtype": dtype}
    with appending(store, origin) as writer:
        for name, action, first, frames in track(clips, f"{len(clips)} clips"):
            if name not in writer.names:
                writer.append(name, action, rows[first : first + frames] * scale)

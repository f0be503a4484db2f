"""The feature store: the frames' features of many clips in one memory-mapped file, and an index that says whose."""

import csv
import fcntl
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from skiprnn.data.base import DataError, replacing

FPS, SECONDS = 25, 10
FRAMES = FPS * SECONDS  # of a clip, at most


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
            self.features = np.load(folder / "features.npy", mmap_mode="r")  # checks the size that it says
            form = self.features.dtype, self.features.shape
            if not isinstance(self.origin, dict) or form[0].kind != "f" or len(form[1]) != 2 or not form[1][1]:
                raise ValueError(f"store.json is no object, or features.npy is {form[0]} of shape {form[1]}")
        except FileNotFoundError as error:
            raise DataError(
                f"no feature store in {folder} ({error.filename} is missing); make it with "
                "python -m skiprnn.data.ucf101 extract (from videos) or convert (from 8-bit features)"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
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
        if clips[-1].first_row != rows or clips[-1].frames < 1:
            raise ValueError(f"{path}: {name} starts at row {first_row}, not {rows}, or has {frames} frames")
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
        """Add the features (frames, F) of a clip.

        Raises:
            DataError: a name that takes more than a line of the index.
        """
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([name, action, self.rows, len(features)])
        line = text.getvalue()
        if len(line.splitlines()) > 1:
            raise DataError(f"{name!r} of class {action!r}: a clip's name and class must fit on a line; rename it")
        self.features.seek(0, 2)
        self.features.write(np.ascontiguousarray(features, dtype=self.dtype).tobytes())
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

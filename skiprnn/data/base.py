"""What the data sets share: the interface, shuffling by (seed, epoch), and files that are fetched and verified.

A data set lives in memory on the training device as a few tensors, and a batch is a selection of rows: no worker
processes, no copies from host to device per step, the same order of examples on every device.

Shapes: B batch, N examples, T steps, I input.
"""

import hashlib
import http.client
import math
import os
import shutil
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

MIRROR = "SKIPRNN_MIRROR"  # environment variable: a folder or URL that holds mnist/..., imdb/... and so on
PACKED = 1032  # bytes that one byte of a compressed file can stand for, at most
TIMEOUT = 10  # seconds without a sign of life after which a source counts as unreachable
STREAMS = ("train", "validation", "test", "embeddings")  # independent streams of a seed, by position: only append

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs (B, T, I) or (B, T), targets (B,), lengths (B,) or None


class DataError(RuntimeError):
    """Data that is missing, corrupt or out of reach. The message says which, and what to do about it."""


class Examples(Protocol):
    """A part of a data set, from which batches are taken."""

    @property
    def targets(self) -> Tensor:
        """(N,), see Split."""

    def to(self, device: torch.device | str) -> Self:
        """The same examples, whose batches are on a device."""

    def take(self, rows: Tensor) -> Batch:
        """The batch of the given rows, (B,) int64 on the examples' device."""


@dataclass(frozen=True)
class Split:
    """Examples in memory, row by row."""

    inputs: Tensor  # (N, T, I) float32, or (N, T) int64 token ids for text
    targets: Tensor  # (N,) int64 classes, or (N,) float32 for regression
    lengths: Tensor | None = None  # (N,) int64 valid steps; None: all T

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> "Split":
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Split(self.inputs.to(device), self.targets.to(device), lengths)

    def take(self, rows: Tensor) -> Batch:
        lengths = None if self.lengths is None else self.lengths.index_select(0, rows)
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows), lengths


class Batches:
    """A known number of batches that are made as they are asked for; every iteration starts anew."""

    def __init__(self, count: int, iterate: Callable[[], Iterator[Batch]]):
        self._count, self._iterate = count, iterate

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate()


def seeded(seed: int, stream: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, stream, epoch) alone: numpy's SeedSequence mixes the three.

    A resumed run therefore sees the batches that an uninterrupted one would have, on whatever device.

    Args:
        seed: of the run, 0 or more.
        stream: one of STREAMS.
        epoch: 0 or more.
    """
    mixed = np.random.SeedSequence(entropy=seed, spawn_key=(STREAMS.index(stream), epoch))
    return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


class SequenceData(ABC):
    """A data set of sequences, as one run sees it.

    Args:
        batch_size: B.
        seed: of the run: the order of the training examples, and what a generated data set draws.
        root: folder for downloaded and prepared files; created when needed.
        drop_last: leave out an epoch's incomplete last training batch. Evaluation never drops an example.

    Raises:
        ValueError: an argument out of its range.
    """

    input_size: int  # I; for text the model's embedding decides, see vocabulary_size
    vocabulary_size: int | None = None  # distinct token ids; None where the inputs are numbers
    steps: int  # T
    image: tuple[int, int] | None = None  # rows and columns, where the steps are an image's pixels
    outputs: int  # classes, or 1
    task: str  # "classification" | "regression"
    examples: dict[str, int]  # per split; for generated data, what an epoch draws
    solved_at: float | None = None  # accuracy above which, squared error below which the task counts as solved
    input_flops: float | None = 0.0  # multiplications that make the input of a step that is used; None if unknown
    note: str = ""  # what a table's caption has to say about the data

    def __init__(self, batch_size: int = 256, seed: int = 0, root: str = "data", drop_last: bool = False):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more; got {seed}")
        self.batch_size, self.seed, self.root, self.drop_last = batch_size, seed, Path(root), drop_last
        self.device = torch.device("cpu")

    def prepare(self) -> None:  # noqa: B027  (nothing to do where nothing is stored)
        """Fetch, verify and unpack what is missing under root. Idempotent, and safe under parallel processes.

        Raises:
            DataError: a file that cannot be had, or is corrupt.
        """

    @abstractmethod
    def load(self, device: torch.device | str) -> None:
        """Bring the data set into memory on a device, preparing what is missing.

        Raises:
            DataError: as prepare.
        """

    def embeddings(self, width: int) -> Tensor:
        """Where the embedding of token ids starts, (vocabulary_size, width) float32; for text only."""
        raise TypeError(f"{type(self).__name__} has no token ids")

    def picture(self, values: np.ndarray) -> np.ndarray:
        """What belongs to the steps' pixels, (T, I, ...), where the image has them: (rows, columns, ...)."""
        assert self.image
        return values.reshape(*self.image, *values.shape[2:])

    @abstractmethod
    def training_batches(self, epoch: int) -> Batches:
        """The batches of an epoch (from 0), a function of (seed, epoch) alone."""

    @abstractmethod
    def evaluation_batches(self, split: str) -> Batches:
        """All examples of "validation" or "test", in order, the incomplete last batch included."""


class StoredData(SequenceData):
    """A data set with fixed examples: subclasses say how to read them, and what the reading depends on."""

    _loaded: dict[tuple, Mapping[str, Examples]] = {}  # noqa: RUF012  (shared on purpose: consecutive runs in one process)

    @abstractmethod
    def read(self) -> Mapping[str, Examples]:
        """All three splits from prepared files, on the CPU."""

    def settings(self) -> tuple:
        """What `read` depends on besides the class and root: runs that agree in it share one copy in memory."""
        return ()

    def load(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.prepare()
        key = (type(self), self.root.resolve(), self.settings(), self.device)
        if key not in self._loaded:
            self._loaded[key] = {name: split.to(self.device) for name, split in self.read().items()}
        self.splits = self._loaded[key]

    def training_batches(self, epoch: int) -> Batches:
        rows = torch.randperm(self.examples["train"], generator=seeded(self.seed, "train", epoch))
        if self.drop_last:
            if len(rows) < self.batch_size:
                raise ValueError(f"batch_size {self.batch_size} with drop_last leaves none of {len(rows)} examples")
            rows = rows[: len(rows) // self.batch_size * self.batch_size]
        return self._batches("train", rows)

    def evaluation_batches(self, split: str) -> Batches:
        return self._batches(split, torch.arange(self.examples[split]))

    def _batches(self, split: str, rows: Tensor) -> Batches:
        chunks = rows.to(self.device).split(self.batch_size)
        return Batches(len(chunks), lambda: map(self.splits[split].take, chunks))


class GeneratedData(SequenceData):
    """A synthetic data set: every epoch draws fresh training batches; validation and test sets are fixed by the seed.

    Args:
        batches_per_epoch: training batches that make an epoch.
        validation_batches, test_batches: size of the fixed sets, in batches.
    """

    def __init__(
        self,
        batches_per_epoch: int,
        validation_batches: int,
        test_batches: int,
        batch_size: int = 256,
        seed: int = 0,
        root: str = "data",
    ):
        super().__init__(batch_size, seed, root)
        self.batches = {"train": batches_per_epoch, "validation": validation_batches, "test": test_batches}
        if min(self.batches.values()) < 1:
            raise ValueError(f"every split must have at least one batch; got {self.batches}")
        self.examples = {split: batches * batch_size for split, batches in self.batches.items()}
        self.note = f"{batches_per_epoch} new batches an epoch"

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of B examples on the CPU, everything random from the generator."""

    def load(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.fixed = {split: list(self._drawn(split)) for split in ("validation", "test")}

    def training_batches(self, epoch: int) -> Batches:
        return Batches(self.batches["train"], lambda: self._drawn("train", epoch))

    def evaluation_batches(self, split: str) -> Batches:
        return Batches(self.batches[split], lambda: iter(self.fixed[split]))

    def _drawn(self, split: str, epoch: int = 0) -> Iterator[Batch]:
        generator = seeded(self.seed, split, epoch)
        for _ in range(self.batches[split]):
            inputs, targets, lengths = self.draw(generator)
            yield inputs.to(self.device), targets.to(self.device), None if lengths is None else lengths.to(self.device)


@dataclass(frozen=True)
class Source:
    """A file and where to have it from."""

    name: str  # below the data folder, and below the mirror: "mnist/train-images-idx3-ubyte.gz"
    md5: str | None = None  # the published checksum, if there is one
    urls: Sequence[str] = ()  # official places


def fetch(root: Path, *files: Source, advice: str = "connect to the internet") -> Path:
    """A verified file below root, taken from SKIPRNN_MIRROR or else the internet if it is not there yet.

    Args:
        root: data folder.
        files: any of them will do, in order of preference.
        advice: for the error message, what helps besides setting SKIPRNN_MIRROR.

    Raises:
        DataError: no source has the file, or it is corrupt.
    """
    for file in files:
        path = root / file.name
        if path.exists():
            verify(path, file, f"delete {path} to fetch it again")
            return path
    mirror = os.environ.get(MIRROR)
    places = [(file, _below(mirror, file.name)) for file in files] if mirror else []
    places += [(file, url) for file in files for url in file.urls]
    failures = []
    for file, url in places:
        path = root / file.name
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as source, replacing(path) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                verify(temporary, file, f"it came from {url}: try again, or set {MIRROR} to a good copy")
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: it is no URL
            failures.append(f"{url}: {error}")
    name = files[0].name
    raise DataError(
        f"cannot get {name}: {advice}, or set {MIRROR} to a folder or URL that holds {name}."
        f"{' Tried: ' if failures else ''}{'; '.join(failures)}"
    )


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file. Room is made for what a header says: so it is compared with the file's size before.

    Raises:
        ValueError: it is damaged, holds something else, or is not there.
    """
    try:
        most = path.stat().st_size * PACKED
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as content:
                    version = npy.read_magic(content)
                    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = header(content)
                    if dtype.hasobject or math.prod(shape) * dtype.itemsize > most:
                        raise ValueError(f"{name} says it has shape {shape} of {dtype}, more than the file can hold")
        with np.load(path) as stored:
            return [stored[name] for name in names]
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error


def verify(path: Path, file: Source, remedy: str) -> None:
    """Compare what is at path with the checksum of the file that it should be.

    Raises:
        DataError: they differ; the message gives the remedy.
    """
    if file.md5 is None:
        return
    there = path.stat()
    found = _md5(path.resolve(), there.st_ino, there.st_size, there.st_ctime_ns)
    if found != file.md5:
        size = there.st_size
        raise DataError(f"{file.name} is corrupt or truncated ({size} bytes, MD5 {found}, not {file.md5}); {remedy}")


@cache
def _md5(path: Path, *state: int) -> str:
    """Of the file that is there, read once for all runs of this process while its state is the same."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` at once when the block succeeds, and vanishes when it fails.

    Whoever reads `path`, in this or another process, sees the whole file or none.

    Raises:
        DataError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(
            f"cannot write to the data folder {path.parent}: {error.strerror}; choose another root"
        ) from error
    try:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _below(mirror: str, name: str) -> str:
    """The URL of a file below a mirror that is given as a folder or as a URL."""
    folder = Path(os.path.expanduser(mirror))  # noqa: PTH111  (pathlib's raises where there is no such user)
    base = mirror if "://" in mirror else folder.absolute().as_uri()
    return f"{base.rstrip('/')}/{urllib.parse.quote(name)}"

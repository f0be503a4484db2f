"""UCF-101: which action does a video show? (Soomro et al. 2012; [SKIP] section 4.4)

Two stages. A frozen convolutional network turns frames into features, once; they are kept in a feature store:

    python -m skiprnn.data.ucf101 extract --videos UCF-101 --store data/ucf101/store
    python -m skiprnn.data.ucf101 convert --features FOLDER --store data/ucf101/store

The second takes features that were stored as 8-bit numbers (extract.py). Both go on where they were stopped.
Training then reads the store (store.py) by memory mapping, whatever its size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skiprnn.data.base import Batch, DataError, Source, StoredData, fetch
from skiprnn.data.ucf101.store import FRAMES, Clip, FeatureStore

LISTS = "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"
GROUP = re.compile(r"_g(\d+)_c\d+$")  # clips of a group come from one video
CLASSES = 101
RESNET50_FLOPS = 3.8e9  # He et al. (2016), Table 1: multiplications of a frame's features, as [SKIP] counts them


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
        return replace(self, targets=self.targets.to(device), device=torch.device(device))

    def take(self, rows: Tensor) -> Batch:
        clips = [self.clips[row] for row in rows.tolist()]
        inputs = np.zeros((len(clips), self.steps, self.features.shape[1]), dtype=self.features.dtype)
        for padded, clip in zip(inputs, clips, strict=True):
            frames = min(clip.frames, self.steps)
            padded[:frames] = self.features[clip.first_row : clip.first_row + frames]
            if not np.isfinite(padded).all():
                raise DataError(
                    f"the feature store holds nan or inf for {clip.name}, row {clip.first_row}: delete the store and "
                    "make it again"
                )
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
        backbone = str(self.features.origin.get("backbone", "an unknown network"))
        self.input_flops = cnn_flops(backbone)
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
        self.note = f"{self.outputs} of {CLASSES} classes, {sum(self.examples.values())} clips, features by {backbone}"
        if self.input_flops:
            self.note += f" ({self.input_flops:.1e} multiplications for each frame used)".replace("e+0", "e")

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


def cnn_flops(backbone: str) -> float | None:
    """Multiplications of a frame's features: for ResNet-50 the paper's figure, else torchvision's, None if unknown."""
    from torchvision import models  # here, for it is slow to import

    if backbone == "resnet50":
        return RESNET50_FLOPS
    try:
        return models.get_model_weights(backbone)["IMAGENET1K_V1"].meta["_ops"] * 1e9
    except (ValueError, KeyError):
        return None


def read_list(path: Path) -> list[tuple[str, str]]:
    """(class, clip) of every line of an official list: "PullUps/v_PullUps_g08_c01.avi 70", the number being optional.

    Raises:
        DataError: a line that names no video.
    """
    entries = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
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

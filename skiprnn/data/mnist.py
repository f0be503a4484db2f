"""Sequential MNIST: 28x28 images read pixel by pixel, in raster order ([SKIP] section 4.3)."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from skiprnn.data.base import DataError, Source, Split, StoredData, fetch

IDX_UINT8 = 0x08  # type code of unsigned bytes in the header of an IDX file


class SequentialMNIST(StoredData):
    """784 steps of one pixel in [0, 1]; 10 classes; 55,000 / 5,000 / 10,000 examples.

    Validation is the last 5,000 images of the training file. The original files come from torchvision's mirrors and
    are checked by torchvision's checksums. The authors' script drops an epoch's incomplete last training batch.

    Args:
        batch_size, seed, root, drop_last: see SequenceData.
    """

    input_size, steps, outputs, task = 1, 784, 10, "classification"
    image = (28, 28)

    def __init__(self, batch_size: int = 256, seed: int = 0, root: str = "data", drop_last: bool = True):
        super().__init__(batch_size, seed, root, drop_last)
        self.examples = {"train": 55_000, "validation": 5_000, "test": 10_000}

    def prepare(self) -> None:
        for file, md5 in MNIST.resources:
            fetch(self.root, Source(f"mnist/{file}", md5, [mirror + file for mirror in MNIST.mirrors]))

    def read(self) -> dict[str, Split]:
        folder = self.root / "mnist"
        train, test = (
            Split(
                read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, self.steps, 1).float() / 255,
                read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long(),
            )
            for part in ("train", "t10k")
        )
        first = self.examples["train"]
        return {
            "train": Split(train.inputs[:first], train.targets[:first]),
            "validation": Split(train.inputs[first:], train.targets[first:]),
            "test": test,
        }


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in a gzipped IDX file: a header of big-endian sizes, then the bytes."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != bytes([0, 0, IDX_UINT8]):
        raise DataError(f"{path} is not an IDX file of unsigned bytes; delete it to fetch it again")
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())

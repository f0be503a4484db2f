"""Sequential digits: the 8x8 handwritten digits that scikit-learn bundles, pixel by pixel. Nothing to download."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skiprnn.data.base import Split, StoredData

SPLIT_SEED = 0  # fixed, so that every run is judged on the same examples


class SequentialDigits(StoredData):
    """64 steps of one pixel in [0, 1]; 10 classes; 1,197 / 300 / 300 examples, stratified.

    Real data in the shape of sequential MNIST (UCI's optical recognition test set, grey levels 0 to 16), small enough
    to try everything in minutes.

    Args:
        batch_size, seed, root, drop_last: see SequenceData. Nothing is stored under root.
    """

    input_size, steps, outputs, task = 1, 64, 10, "classification"
    image = (8, 8)

    def __init__(self, batch_size: int = 64, seed: int = 0, root: str = "data", drop_last: bool = False):
        super().__init__(batch_size, seed, root, drop_last)
        self.examples = {"train": 1_197, "validation": 300, "test": 300}

    def read(self) -> dict[str, Split]:
        pixels, classes = load_digits(return_X_y=True)
        rest, test = train_test_split(
            np.arange(len(classes)), test_size=self.examples["test"], stratify=classes, random_state=SPLIT_SEED
        )
        train, validation = train_test_split(
            rest, test_size=self.examples["validation"], stratify=classes[rest], random_state=SPLIT_SEED
        )
        inputs = torch.from_numpy(pixels).float().unsqueeze(2) / 16
        targets = torch.from_numpy(classes).long()
        parts = {"train": train, "validation": validation, "test": test}
        return {name: Split(inputs[rows], targets[rows]) for name, rows in parts.items()}

"""Sequential digits: the 8x8 handwritten digits that scikit-learn bundles, pixel by pixel or some at a time."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skiprnn.data.base import Split, StoredData

SPLIT_SEED = 0  # fixed, so that every run is judged on the same examples


class SequentialDigits(StoredData):
    """Sequences of pixels in [0, 1], 64 steps of one; 10 classes; 1,197 / 300 / 300 examples, stratified.

    Real data in the shape of sequential MNIST (UCI's optical recognition test set, grey levels 0 to 16), small enough
    to try everything in minutes. Held for several steps they have what makes skipping pay: samples that repeat.

    Args:
        pixels: of a row that a step has, I; 1, 2, 4 or 8.
        hold: steps that show the same pixels; T = 64 / pixels * hold.
        batch_size, seed, root, drop_last: see SequenceData. Nothing is stored under root.

    Raises:
        ValueError: an argument out of its range.
    """

    outputs, task = 10, "classification"

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        root: str = "data",
        drop_last: bool = False,
        pixels: int = 1,
        hold: int = 1,
    ):
        super().__init__(batch_size, seed, root, drop_last)
        if pixels not in (1, 2, 4, 8):
            raise ValueError(f"pixels must be 1, 2, 4 or 8, which divide a row; got {pixels}")
        if not 1 <= hold <= 2**10:
            raise ValueError(f"hold must be at least 1, and at most {2**10}; got {hold}")
        self.input_size, self.hold = pixels, hold
        self.image, self.steps = (8 * hold, 8), 64 // pixels * hold
        self.examples = {"train": 1_197, "validation": 300, "test": 300}

    def settings(self) -> tuple:
        return (self.input_size, self.hold)

    def read(self) -> dict[str, Split]:
        pixels, classes = load_digits(return_X_y=True)
        rest, test = train_test_split(
            np.arange(len(classes)), test_size=self.examples["test"], stratify=classes, random_state=SPLIT_SEED
        )
        train, validation = train_test_split(
            rest, test_size=self.examples["validation"], stratify=classes[rest], random_state=SPLIT_SEED
        )
        shown = torch.from_numpy(pixels).float().reshape(len(pixels), -1, self.input_size) / 16
        inputs = shown.repeat_interleave(self.hold, 1)
        targets = torch.from_numpy(classes).long()
        parts = {"train": train, "validation": validation, "test": test}
        return {name: Split(inputs[rows], targets[rows]) for name, rows in parts.items()}

    def picture(self, values: np.ndarray) -> np.ndarray:
        """See SequenceData.picture; a row of pixels that is shown for several steps is drawn as so many rows."""
        rows = values.reshape(8, 8 // self.input_size, self.hold, self.input_size, *values.shape[2:])
        return rows.swapaxes(1, 2).reshape(8 * self.hold, 8, *values.shape[2:])

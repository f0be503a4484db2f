"""Shared by all tests: small runs on the bundled digits, composed as a user would compose them."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: then the GPU engine's kernels can be tested on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from skiprnn.data.ucf101.store import appending
from skiprnn.training import command_line, config, job
from skiprnn.training.config import RunConfig

CONF = str(config.packaged("conf"))
SMALL = [
    "training.epochs=4",
    "training.batch_size=256",
    "model.hidden_size=6",
    "threads=1",
    "device=cpu",
]

torch.set_num_threads(1)  # bit-for-bit comparisons with subprocesses, which get threads=1


def compose(overrides: list[str], **options):
    """The Hydra config of a list of overrides."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config", overrides, **options)


@pytest.fixture
def small_run(tmp_path):
    """A function: overrides -> a run of seconds in a folder of its own."""

    def make(*overrides: str) -> RunConfig:
        return command_line.read(compose([*SMALL, f"output={tmp_path}", *overrides]))

    return make


def trained(run: RunConfig, draw=None) -> dict:
    """The record of a run that is trained to its end."""
    (record,) = job.train([run], draw)
    return record


def command(
    *arguments: str, script: str | None = None, module: str = "skiprnn.train", **options
) -> subprocess.CompletedProcess:
    """Run `python -m skiprnn.train` (or another module, or a script that stands in for it) as a user's process."""
    program = ["-c", script] if script else ["-m", module]
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, check=False, timeout=600, **options
    )


def next_steps(printed: str) -> list[list[str]]:
    """The commands that a command's last line names: [[NAME, *arguments], ...]."""
    line = printed.splitlines()[-1]
    assert line.startswith("Next: python -m skiprnn.")
    return [shlex.split(one)[2:] for one in line.removeprefix("Next: ").replace("skiprnn.", "").split("; ")]


def entries(state) -> list[torch.Tensor]:
    """All tensors of a returned state: h, an LSTM's c, and the gate state, for layers of one size."""
    parts = [state] if isinstance(state, torch.Tensor) else list(state)
    return [*parts, *getattr(parts[0], "gate_state", ())]


@contextmanager
def triton_kernels():
    """The GPU engine's products in full precision, on a GPU or, interpreted, on the CPU; skips without Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    precision = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = precision


def make_small_ucf101(root: Path) -> None:
    """A feature store below a data folder, two classes of random features, with the lists that name its clips."""
    folder = root / "ucf101"
    clips = [f"{action}/v_{action}_g{group:02}_c01" for action in ("Lunges", "PullUps") for group in range(1, 26)]
    origin = {"backbone": "random", "weights": "none", "fps": 25, "seconds": 10, "width": 4, "dtype": "float16"}
    rng = np.random.default_rng(0)
    with appending(folder / "store", origin) as writer:
        for frames, clip in enumerate(clips, start=20):
            if Path(clip).name not in writer.names:
                writer.append(Path(clip).name, Path(clip).parent.name, rng.standard_normal((frames, 4)))
    for part, groups in {"test": range(1, 8), "train": range(8, 26)}.items():
        lines = [f"{clip}.avi\n" for clip in clips if int(clip[-6:-4]) in groups]
        (folder / f"{part}list01.txt").write_text("".join(lines))


def make_small_imdb(root: Path, text: Callable[[str, str, int], str], per_class: int = 10) -> None:
    """Reviews below a data folder: the text of each part, label and number."""
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            folder = root / "imdb" / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for number in range(per_class):
                (folder / f"{number}_5.txt").write_text(text(part, label, number), "utf-8")

"""A checkpoint measured here, beside the same network without skipping; or many of them, compared with their records.

    python -m skiprnn.evaluate checkpoint=outputs/mnist/skip_lstm_lambda0.0001/seed0_3f2a9c1b/best.ckpt
    python -m skiprnn.evaluate verify='results/*/checkpoints/mnist'

`checkpoint` is a run's best.ckpt or last.ckpt, or a published .safetensors. Without skipping is the same cell with the
same weights, updating at every step: what skipping saves, and what it is worth to this network.
"""

import copy
import glob
import itertools
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track
from rich.table import Table
from yaml import YAMLError

from skiprnn.data.base import Batch, SequenceData
from skiprnn.model import pretrained
from skiprnn.model.policies import Always
from skiprnn.training import measures, provenance
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import read_checkpoint
from skiprnn.training.job import USER_ERRORS, quieten
from skiprnn.training.module import evaluate
from skiprnn.training.network import Network
from skiprnn.training.setup import load
from skiprnn.training.timing import alternate

MESSAGES = Console(stderr=True)  # progress
BATCHES = (1, 256)  # sequences at a time, of which the time is measured
SINGLE = 8  # sequences that are timed one by one
TOLERANCE = {"accuracy": 0.005, "mse": 2e-4, "state_updates": 0.01}  # between devices; of the updates, relative


@dataclass
class Settings:
    """The command line."""

    checkpoint: str | None = None  # a file
    verify: str | None = None  # folders of published checkpoints, * for any
    split: str = "test"  # or validation
    data_root: str = "data"
    device: str = "auto"
    engine: str = "auto"
    threads: int | None = None
    repetitions: int = 7  # of every measurement of time, the median counts

    def __post_init__(self):
        if (self.checkpoint is None) == (self.verify is None):
            raise ConfigError("checkpoint=FILE is missing, or verify='FOLDER': what is to be evaluated?")
        if self.split not in ("validation", "test"):
            raise ConfigError(f"split={self.split}: there are validation, test")
        if self.repetitions < 1:
            raise ConfigError(f"repetitions={self.repetitions}: must be at least 1")

    @property
    def place(self) -> dict[str, str | int | None]:
        """Where and how it is computed, no part of what a checkpoint is."""
        return {key: getattr(self, key) for key in ("data_root", "device", "engine", "threads")}


def told(batches: Iterable[Batch], count: int) -> Iterable[Batch]:
    """The batches, while a bar tells how far it is."""
    return track(batches, "evaluating", count, transient=True, console=MESSAGES)


def without_skipping(network: Network) -> Network:
    """The same cells and weights, updating at every step."""
    twin = copy.deepcopy(network)
    twin.rnn.policy = Always()
    return twin


def seconds_per_sequence(
    networks: dict[str, Network], data: SequenceData, split: str, batch: int, repetitions: int
) -> dict[str, float]:
    """Seconds that each network takes for a sequence of the data; medians of alternating repetitions.

    Args:
        networks: to be compared, by name.
        data, split: where the sequences come from.
        batch: sequences at a time. One at a time, SINGLE of them are timed together; a split smaller than the batch
            makes one batch.
        repetitions: of every measurement.
    """
    batches: list[Batch] = []
    count = max(batch, SINGLE)
    for taken in data.evaluation_batches(split):
        batches.append(taken)
        if sum(len(targets) for _, targets, _ in batches) >= count:
            break
    inputs = torch.cat([x for x, _, _ in batches])[:count]
    valid = [lengths for _, _, lengths in batches if lengths is not None]
    lengths = torch.cat(valid)[:count].split(batch) if valid else itertools.repeat(None)
    chunks = list(zip(inputs.split(batch), lengths, strict=False))

    @torch.no_grad()
    def forward(network: Network) -> None:
        for x, valid_steps in chunks:
            network(x, valid_steps)[0].sum().item()  # waits for the device

    times = alternate({name: partial(forward, network) for name, network in networks.items()}, repetitions)
    return {name: seconds / len(inputs) for name, seconds in times.items()}


def compare(path: Path, settings: Settings) -> None:
    """Print metrics and times of a checkpoint beside those of the same network without skipping."""
    module = load(path, **settings.place)
    networks = {"as trained": module.network, "without skipping": without_skipping(module.network)}
    measured = [evaluate(module, settings.split, network=network, shown=told) for network in networks.values()]
    score = measures.SCORES[module.data.task]
    table = Table("", *networks, "ratio")
    for name, key, form in [
        (score, score, ".4f" if score == "accuracy" else ".3e"),
        ("state updates", "state_updates", ".2f"),
        ("inference FLOPs", "inference_flops", ".3e"),
    ]:
        values = [results[key] for results in measured]
        table.add_row(name, *(f"{value:{form}}" for value in values), "" if key == score else _ratio(values))
    for batch in BATCHES:
        times = seconds_per_sequence(networks, module.data, settings.split, batch, settings.repetitions)
        values = [1e3 * seconds for seconds in times.values()]
        table.add_row(f"ms per sequence, batch {batch}", *(f"{value:.3g}" for value in values), _ratio(values))
    where = provenance.describe(module.device, module.engine)
    print(f"{path}\n{settings.split} set, {module.data.examples[settings.split]:,} sequences;", end=" ")
    print(f"{where['device']}, engine {where['engine']}, threads: {where['threads']}")
    Console().print(table)
    if path.suffix == pretrained.SUFFIX:
        print("Next: python -m skiprnn.evaluate", shlex.quote(f"verify={path.parent}"))
    elif path.parent.as_posix().endswith(module.run.name):  # in its run folder
        print("Next: python -m skiprnn.dashboard", shlex.quote(str(path.parents[3])))


def _ratio(values: Sequence[float]) -> str:
    trained, plain = values
    return f"{trained / plain:.3f}"


def verify(files: Sequence[Path], settings: Settings) -> int:
    """Evaluate published checkpoints on the test set as their runs did, and print them beside their records.

    Returns:
        How many differ by more than TOLERANCE: devices round differently, and draw other random steps.

    Raises:
        ConfigError: one has no test results in its record, or cannot be loaded.
    """
    differing = 0
    for number, path in enumerate(files, start=1):
        module = load(path, **settings.place)
        score = measures.SCORES[module.data.task]
        try:
            test = read_checkpoint(path)["record"]["final" if path.name == pretrained.LAST else "best"]["test"]
            recorded = {key: float(test[key]) for key in (score, "state_updates")}
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"checkpoint {path}: its record has no test results to compare with") from None
        found = evaluate(module, batches=module.run.training.evaluation_batches, shown=told)
        allowed = {score: TOLERANCE[score], "state_updates": TOLERANCE["state_updates"] * recorded["state_updates"]}
        same = all(abs(found[key] - recorded[key]) <= most for key, most in allowed.items())
        differing += not same
        values = ", ".join(f"{key} {found[key]:.6g} (recorded {recorded[key]:.6g})" for key in allowed)
        print(f"{number}/{len(files)} {'agrees ' if same else 'DIFFERS'} {path}: {values}", flush=True)
    return differing


def main(arguments: Sequence[str]) -> None:
    """Measure a checkpoint, or verify many; exits with status 1 if one differs from its record."""
    quieten()
    try:
        given = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_cli(list(arguments)))
        settings = OmegaConf.to_object(given)
        assert isinstance(settings, Settings)
        if settings.checkpoint:
            compare(Path(settings.checkpoint), settings)
            return
        pattern = f"{settings.verify}/**/*{pretrained.SUFFIX}"
        files = [Path(file) for file in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  (may be absolute)
        if not files:
            raise ConfigError(f"verify={settings.verify}: no published checkpoint (*{pretrained.SUFFIX}) there")
        differing = verify(files, settings)
    except (*USER_ERRORS, OmegaConfBaseException, YAMLError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    if differing:
        sys.exit(f"error: {differing} of {len(files)} checkpoints differ from their records")
    print("Next: python -m skiprnn.evaluate", shlex.quote(f"checkpoint={files[0]}"))


if __name__ == "__main__":
    main(sys.argv[1:])

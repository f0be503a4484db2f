"""Runs trained side by side: task loss + λ * state updates, Adam, clipping; one run is the case R = 1.

Runs differ in the seed and agree in all else. Their time loops may share a launch; batches, random numbers, clipping,
optimiser state and what is measured are each run's own, as if it had been alone.
Shapes: B batch, T steps, H hidden, C outputs, R runs.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from skiprnn.data.base import Batch, Batches, SequenceData
from skiprnn.model import engines
from skiprnn.training import measures
from skiprnn.training.config import DivergedError, RunConfig
from skiprnn.training.network import Network


def stage_seed(seed: int, stage: str, epoch: int) -> int:
    """A seed for torch's generator that depends on the run, the stage and the epoch alone: resuming repeats it."""
    digest = hashlib.sha256(f"{seed}/{stage}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class SequenceModule(nn.Module):
    """One run: its network on its data, its optimiser, its random numbers, and what is measured.

    Args:
        run: what it is.
        data: loaded; where they are, the network goes.
    """

    def __init__(self, run: RunConfig, data: SequenceData):
        super().__init__()
        self.run, self.data = run, data
        torch.manual_seed(stage_seed(run.seed, "initialisation", 0))
        self.network = Network(run.model, data, run.engine).to(self.device)
        self.adam = torch.optim.Adam(self.parameters(), lr=run.training.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        self.epoch = run.training.epochs - 1  # λ and the learning rate are this epoch's
        self.sums: dict[str, measures.EpochSums] = {}
        self.random_state = torch.Generator(self.device).get_state()
        self.batches = 0  # of the epoch that are trained
        self.begun: dict[str, Any] | None = None  # what `within_epoch` gave, to go on from

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def engine(self) -> str:
        """Who runs the time loop."""
        rnn = self.network.rnn
        return rnn.engine_for(torch.empty(1, 1, rnn.input_size, device=self.device))

    @property
    def cost_per_sample(self) -> float:
        """λ of the current epoch."""
        return self.run.model.cost_per_sample if self.epoch >= self.run.training.cost_free_epochs else 0.0

    @property
    def learning_rate(self) -> float:
        """Of the current epoch: rising in equal steps from 0, constant, falling in equal steps to 0 after the last."""
        training = self.run.training
        done, left = self.epoch + 1, training.epochs - self.epoch
        share = min(1.0, done / (training.warmup_epochs + 1), left / (training.decay_epochs + 1))
        return training.learning_rate * share

    def within_epoch(self) -> dict[str, Any]:
        """What an epoch has come to besides weights and optimiser: plain values and tensors on the CPU."""
        sums = self.sums["train"]
        state = {"sums": sums.sums.cpu(), "examples": sums.examples, "random_state": self.random_state.cpu()}
        return state | {"batches": self.batches}

    def begin(self, stage: str, epoch: int | None = None) -> None:
        """Start a stage's sums and its random numbers; training begins an epoch, the other stages have none."""
        if epoch is not None:
            self.epoch = epoch
            self.network.rnn.policy.set_epoch(epoch)
            for group in self.adam.param_groups:
                group["lr"] = self.learning_rate
        self.sums[stage] = measures.EpochSums(self.data.task, self.device)
        seed = stage_seed(self.run.seed, stage, epoch or 0)
        self.random_state = torch.Generator(self.device).manual_seed(seed).get_state()
        if epoch is not None:
            self.batches = 0
            if self.begun:
                self.sums[stage].sums += self.begun["sums"].to(self.device)
                self.sums[stage].examples = self.begun["examples"]
                self.random_state, self.batches = self.begun["random_state"], self.begun["batches"]
                self.begun = None

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Within, the device's random numbers are this run's, which go on from where they were left."""
        on_gpu = self.device.type == "cuda"
        generator = torch.cuda.default_generators[self.device.index] if on_gpu else torch.default_generator
        outside = generator.get_state()
        generator.set_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = generator.get_state()
            generator.set_state(outside)

    def loss(self, prediction: Tensor, updates: Tensor, targets: Tensor, stage: str) -> Tensor:
        """Task loss + λ * state updates, mean over the batch, which is added to the stage's sums.

        Args:
            prediction, updates: the network's, (B, C), and (B, T) or (B, T, H).
            targets: (B,).
        """
        measured = measures.measure(self.data.task, prediction, updates, targets, self.cost_per_sample)
        self.sums[stage].add(measured)
        return measured.loss

    def results(self, stage: str) -> dict[str, float]:
        """Means over the stage's examples since it began.

        Raises:
            DivergedError: the loss is nan or infinite.
        """
        results = self.sums[stage].results()
        if not torch.isfinite(torch.tensor(results["loss"])):
            raise DivergedError(
                f"seed {self.run.seed}: the {stage} loss became {results['loss']} in epoch {self.epoch}: lower "
                "training.learning_rate, training.gradient_clip or, to stop before, training.epochs",
                self.run,
            )
        return results


@torch.no_grad()
def evaluate(
    module: SequenceModule,
    split: str = "test",
    batches: int | None = None,
    network: Network | None = None,
    shown: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches,
) -> dict[str, float]:
    """Means over a split's examples, and `inference_flops` per sequence.

    Args:
        module: in evaluation mode.
        split: "validation" or "test".
        batches: so many of the split; None: all.
        network: in place of the module's.
        shown: (batches, their number) -> the same, while somebody is told how far it is.

    Raises:
        DivergedError: the loss is nan or infinite.
    """
    network = network or module.network
    module.begin(split)
    loader = module.data.evaluation_batches(split)
    count = min(len(loader), batches or len(loader))
    for inputs, targets, lengths in shown(islice(loader, count), count):
        with module.randomness():
            prediction, updates = network(inputs, lengths)
        module.loss(prediction, updates, targets, split)
    results = module.results(split)
    flops = measures.inference_flops(network.rnn, results["state_updates"], module.data.steps)
    return results | {"inference_flops": flops}


class SideBySide(lightning.LightningModule):
    """R runs in lockstep.

    Args:
        runs: each on the same device.
    """

    def __init__(self, runs: Sequence[SequenceModule]):
        super().__init__()
        self.automatic_optimization = False
        self.runs: Sequence[SequenceModule] = nn.ModuleList(runs)  # type: ignore[assignment]

    def losses(self, batches: Sequence[Batch], stage: str) -> list[Tensor]:
        """Each run's loss on its batch."""
        calls = []
        for run, (inputs, _, lengths) in zip(self.runs, batches, strict=True):
            with run.randomness():
                calls.append(run.network.rnn.prepare(run.network.embed(inputs), lengths=lengths))
        engine = self.runs[0].network.rnn.engine_for(calls[0][2])
        losses = []
        results = engines.run_packed(engine, calls)
        for run, result, (_, targets, _) in zip(self.runs, results, batches, strict=True):
            _, state, updates = run.network.rnn.finish([result])
            with run.randomness():
                prediction = run.network.read(state)
            losses.append(run.loss(prediction, updates, targets, stage))
        return losses

    def training_step(self, batches: Sequence[Batch], batch_index: int = 0) -> None:
        if not batches:  # trained before
            return
        losses = self.losses(batches, "train")
        torch.stack(losses).sum().backward()  # a run's gradient is that of its own loss
        for run in self.runs:
            nn.utils.clip_grad_norm_(run.parameters(), run.run.training.gradient_clip)
            run.adam.step()
            run.adam.zero_grad()
            run.batches += 1

    def validation_step(self, batches: Sequence[Batch], batch_index: int = 0) -> None:
        self.losses(batches, "validation")

    def on_train_epoch_start(self) -> None:
        for run in self.runs:
            run.begin("train", self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        for run in self.runs:
            run.begin("validation")

    def on_validation_epoch_end(self) -> None:
        """The two figures that matter on the way, means over the runs; stops before anything is written of an epoch in
        which a run diverged."""
        results = [run.results("validation") for run in self.runs]
        for key in (measures.SCORES[self.runs[0].data.task], "state_updates"):
            self.log(key, sum(result[key] for result in results) / len(results), prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        return [run.adam for run in self.runs]

    def train_dataloader(self) -> Iterable:
        return _SideBySide(self.runs, lambda run: run.data.training_batches(self.current_epoch), trained=True)

    def val_dataloader(self) -> Iterable:
        return _SideBySide(self.runs, lambda run: run.data.evaluation_batches("validation"))


class _SideBySide:
    """A batch of each run at a time; asked for anew in each epoch, when the first one is wanted.

    Args:
        trained: those that the epoch has trained before, as its runs count them, are there without content, for
            Lightning counts them.
    """

    def __init__(
        self, runs: Sequence[SequenceModule], batches: Callable[[SequenceModule], Batches], trained: bool = False
    ):
        self.runs, self.batches, self.trained = runs, batches, trained

    def __len__(self) -> int:
        return len(self.batches(self.runs[0]))

    def __iter__(self) -> Iterator[list[Batch]]:
        done = self.runs[0].batches if self.trained else 0
        for index, batches in enumerate(zip(*map(self.batches, self.runs), strict=True)):
            yield list(batches) if index >= done else []

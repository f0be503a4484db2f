"""Runs trained side by side: task loss + λ * state updates, Adam, clipping; one run is the case R = 1.

Runs agree in their data and protocol. The time loops of those of one architecture may share a launch; batches, random
numbers, clipping, optimiser state and what is measured are each run's own, as if it had been alone.
Shapes: B batch, T steps, H hidden, N neurons, C outputs, R runs.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from skiprnn.data.base import Batch, Batches, SequenceData
from skiprnn.model import engines
from skiprnn.model.policies import Policy
from skiprnn.model.recurrent import Recurrent
from skiprnn.training import measures
from skiprnn.training.config import DivergedError, RunConfig
from skiprnn.training.graph import Given, Recorder
from skiprnn.training.network import Network

Drawn = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # a batch, and the policy's decisions
WRITTEN_EVERY = {"cuda": 20}  # seconds at least between checkpoints; elsewhere each epoch's end is written


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
        # on a GPU one kernel, which a graph can hold: it reads the learning rate from memory
        learning_rate, on_gpu = run.training.learning_rate, self.device.type == "cuda"
        self.adam = torch.optim.Adam(
            self.parameters(),
            lr=torch.tensor(learning_rate, device=self.device) if on_gpu else learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=on_gpu or None,
            capturable=on_gpu,
        )
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
        state = {"sums": sums.sums[:-1].cpu(), "examples": sums.examples, "random_state": self.random_state.cpu()}
        return state | {"batches": self.batches}

    def restore_optimiser(self, state: dict[str, Any]) -> None:
        """Go on with Adam's moments from a checkpoint, whatever device they were computed on."""
        self.adam.load_state_dict(state | {"param_groups": self.adam.state_dict()["param_groups"]})
        for parameter, moments in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # of Skip's bias, a scalar in older checkpoints
                moments[name] = moments[name].reshape(parameter.shape)

    def begin(self, stage: str, epoch: int | None = None) -> None:
        """Start a stage's sums and its random numbers; training begins an epoch, the other stages have none."""
        if stage not in self.sums:
            self.sums[stage] = measures.EpochSums(self.data.task, self.device)
        self.sums[stage].clear()
        seed = stage_seed(self.run.seed, stage, epoch or 0)
        self.random_state = torch.Generator(self.device).manual_seed(seed).get_state()
        if epoch is not None:
            self.epoch, self.batches = epoch, 0
            self.network.rnn.policy.set_epoch(epoch)
            for group in self.adam.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.learning_rate)
                else:
                    group["lr"] = self.learning_rate
            if self.begun:
                self._go_on_within(self.begun, stage)
                self.begun = None

    def _go_on_within(self, begun: dict[str, Any], stage: str) -> None:
        self.batches = begun["batches"]
        self.sums[stage].sums.copy_(torch.cat([begun["sums"], torch.tensor([begun["examples"]])]))
        if len(begun["random_state"]) == len(self.random_state):  # else it is another device's
            self.random_state = begun["random_state"]

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

    def draw(self, rnn: Recurrent, inputs: Tensor) -> Tensor | None:
        """The policy's random decisions for a batch (B, T, ...), the run's next ones; None where it draws nothing."""
        if type(rnn.policy).draw is Policy.draw:
            return None
        x = rnn.cells[0].weight_ih.new_empty(1).expand(*inputs.shape[:2], 1)
        with self.randomness():
            return rnn.policy.draw(x, sum(cell.hidden_size for cell in rnn.cells))

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
        if not math.isfinite(results["loss"]):
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
    pack = Pack([module], [network])
    module.begin(split)
    loader = module.data.evaluation_batches(split)
    count = min(len(loader), batches or len(loader))
    for batch in shown(islice(loader, count), count):
        pack.step([batch], split)
        pack.call.join()
    results = module.results(split)
    flops = measures.inference_flops(network.rnn, results["state_updates"], module.data.steps)
    return results | {"inference_flops": flops}


class Pack:
    """Runs of one architecture, in lockstep.

    Args:
        runs: each on the same device.
        networks: in place of theirs, for evaluation.
    """

    def __init__(self, runs: Sequence[SequenceModule], networks: Sequence[Network] | None = None):
        self.runs, self.call = runs, Recorder(runs[0].device)
        self.networks = networks or [run.network for run in runs]

    def step(self, batches: Sequence[Batch], stage: str) -> None:
        """Train each run on its batch, or evaluate it in another stage."""
        tensors: list[Tensor | None] = []
        for run, network, batch in zip(self.runs, self.networks, batches, strict=True):
            tensors += [*batch, run.draw(network.rnn, batch[0])]
        function = self.train if stage == "train" else partial(self.evaluate, stage)
        if self.runs[0].run.model.dropout:  # it draws within
            function(tensors)
        else:
            self.call(function, tensors, (stage, *(run.cost_per_sample for run in self.runs)))

    def losses(self, tensors: Given, stage: str) -> list[Tensor]:
        """Each run's loss, from its inputs, targets, lengths and draw, run by run."""
        given = [cast(Drawn, tensors[start : start + 4]) for start in range(0, len(tensors), 4)]
        calls = [
            network.rnn.prepare(network.embed(inputs), lengths=lengths, draw=draw)
            for network, (inputs, _, lengths, draw) in zip(self.networks, given, strict=True)
        ]
        results = engines.run_packed(self.networks[0].rnn.engine_for(calls[0].x), calls)
        losses = []
        for run, network, result, (_, targets, _, _) in zip(self.runs, self.networks, results, given, strict=True):
            _, state, updates = network.rnn.finish([result])
            with run.randomness() if run.run.model.dropout else nullcontext():
                prediction = network.read(state)
            losses.append(run.loss(prediction, updates, targets, stage))
        return losses

    def train(self, tensors: Given) -> None:
        """A training step of each run, see `losses`."""
        torch.stack(self.losses(tensors, "train")).sum().backward()  # a run's gradient is that of its own loss
        for run in self.runs:
            nn.utils.clip_grad_norm_(run.parameters(), run.run.training.gradient_clip)
            run.adam.step()
            run.adam.zero_grad()

    @torch.no_grad()
    def evaluate(self, stage: str, tensors: Given) -> None:
        """Add each run's results to its sums."""
        self.losses(tensors, stage)


def architecture(run: RunConfig) -> str:
    """What runs that share launches agree in."""
    return repr(replace(run.model, name="any", cost_per_sample=0.0, p_skip=None if run.model.p_skip is None else 0.5))


class SideBySide(lightning.LightningModule):
    """R runs in lockstep, on data and by a protocol that they agree in.

    Args:
        runs: each on the same device.
    """

    def __init__(self, runs: Sequence[SequenceModule]):
        super().__init__()
        self.automatic_optimization = False
        self.runs: Sequence[SequenceModule] = nn.ModuleList(runs)  # type: ignore[assignment]
        alike: dict[str, list[SequenceModule]] = {}
        for run in runs:
            alike.setdefault(architecture(run.run), []).append(run)
        self.packs = [Pack(some) for some in alike.values()]
        self.due, self.written = True, time.monotonic()  # whether what this epoch comes to is to be written

    def step(self, batches: Sequence[Batch], stage: str) -> None:
        """Train or validate each run on its batch; all packs at once where the device can."""
        own = dict(zip(self.runs, batches, strict=True))
        for pack in self.packs:
            pack.step([own[run] for run in pack.runs], stage)
        for pack in self.packs:
            pack.call.join()

    def training_step(self, batches: Sequence[Batch], batch_index: int = 0) -> None:
        if not batches:  # trained before
            return
        self.step(batches, "train")
        for run in self.runs:
            run.batches += 1

    def validation_step(self, batches: Sequence[Batch], batch_index: int = 0) -> None:
        self.step(batches, "validation")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there

    def on_train_epoch_start(self) -> None:
        for run in self.runs:
            run.begin("train", self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        for run in self.runs:
            run.begin("validation")

    def on_validation_epoch_end(self) -> None:
        """The two figures that matter on the way, means over the runs; stops before anything is written of an epoch in
        which a run diverged.

        Where an epoch of all runs takes seconds, on a GPU, not every one is written."""
        results = [run.results("validation") for run in self.runs]
        for key in (measures.SCORES[self.runs[0].data.task], "state_updates"):
            self.log(key, sum(result[key] for result in results) / len(results), prog_bar=True, logger=False)
        now, every = time.monotonic(), WRITTEN_EVERY.get(self.runs[0].device.type, 0)
        self.due = now - self.written >= every or self.current_epoch + 1 == self.trainer.max_epochs
        self.written = now if self.due else self.written

    def configure_optimizers(self) -> Any:
        return [run.adam for run in self.runs]

    def train_dataloader(self) -> Iterable:
        return self._together(lambda run: run.data.training_batches(self.current_epoch), trained=True)

    def val_dataloader(self) -> Iterable:
        return self._together(lambda run: run.data.evaluation_batches("validation"))

    def _together(self, of: Callable[[SequenceModule], Batches], trained: bool = False) -> Batches:
        """A batch of each run at a time, as a list; asked for anew in each epoch, when the first one is wanted.

        Args:
            trained: those that the epoch has trained before, as its runs count them, are there without content, for
                Lightning counts them.
        """

        def together() -> Iterator[Any]:
            done = self.runs[0].batches if trained else 0
            for index, batches in enumerate(zip(*map(of, self.runs), strict=True)):
                yield list(batches) if index >= done else []

        return Batches(len(of(self.runs[0])), together)

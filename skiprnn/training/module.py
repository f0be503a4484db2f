"""The LightningModule: a recurrent network with a linear readout, task loss + λ * state updates, Adam, metrics.

Shapes: B batch, T steps, I input, H hidden, C outputs.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from skiprnn.data.base import SequenceData
from skiprnn.model.recurrent import Recurrent, RecurrentState
from skiprnn.training import measures as metrics
from skiprnn.training.config import ModelConfig, RunConfig


class DivergedError(RuntimeError):
    """The loss became nan or infinite."""


def stage_seed(seed: int, stage: str, epoch: int) -> int:
    """A seed for torch's generator that depends on the run, the stage and the epoch alone: resuming repeats it."""
    digest = hashlib.sha256(f"{seed}/{stage}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Network(nn.Module):
    """Embedding of token ids if the data are text, recurrent network, then a linear layer on its last valid state.

    Args:
        model: cell, policy and sizes.
        data: gives I, C, and what an embedding starts from.
        engine: who runs the time loop.
    """

    def __init__(self, model: ModelConfig, data: SequenceData, engine: str = "auto"):
        super().__init__()
        self.embedding, input_size = None, data.input_size
        if data.vocabulary_size:
            input_size = model.embedding_size
            self.embedding = nn.Embedding.from_pretrained(data.embeddings(input_size), freeze=False)
        self.rnn = Recurrent(
            model.cell,
            model.policy,
            input_size,
            model.hidden_size,
            model.num_layers,
            learn_initial_state=model.learn_initial_state,
            p_skip=model.p_skip,
            engine=engine,
        )
        self.dropout = nn.Dropout(model.dropout)
        self.readout = nn.Linear(model.hidden_size, data.outputs)
        nn.init.xavier_uniform_(self.readout.weight)  # tf.contrib.layers.linear
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, I), or token ids (B, T) -> prediction (B, C), updates (B, T) or (B, T, H)."""
        _, state, updates = self.rnn(self.embed(x), lengths=lengths)
        return self.read(state), updates

    def embed(self, x: Tensor) -> Tensor:
        """What the recurrent network reads, (B, T, I)."""
        return x if self.embedding is None else self.embedding(x)

    def read(self, state: RecurrentState) -> Tensor:
        """The prediction (B, C) from the last state."""
        return self.readout(self.dropout(state.h[-1]))


class SequenceModule(lightning.LightningModule):
    """Trains one run. Metrics of each stage are in `results(stage)` when it is over.

    Args:
        run: the run; its seed decides initialisation, shuffling and random policies.
        data: the loaded data set; batches come from here.
    """

    def __init__(self, run: RunConfig, data: SequenceData):
        super().__init__()
        self.model, self.protocol, self.seed, self.identity = run.model, run.training, run.seed, run.identity
        self.data = data
        torch.manual_seed(stage_seed(run.seed, "initialisation", 0))
        self.network = Network(run.model, data, run.engine)
        self.sums: dict[str, metrics.EpochSums] = {}

    @property
    def cost_per_sample(self) -> float:
        """λ of the current epoch."""
        return self.model.cost_per_sample if self.current_epoch >= self.protocol.cost_free_epochs else 0.0

    def losses(self, batch: tuple[Tensor, Tensor, Tensor | None], stage: str) -> Tensor:
        """Task loss + λ * state updates, mean over the batch; adds the batch to the stage's sums."""
        inputs, targets, lengths = batch
        prediction, updates = self.network(inputs, lengths)
        return self.count(prediction, updates, targets, stage)

    def count(self, prediction: Tensor, updates: Tensor, targets: Tensor, stage: str) -> Tensor:
        """As losses, from what the network gave."""
        task = metrics.task_loss(self.data.task, prediction, targets)
        counts = metrics.state_updates(updates)
        budget = self.cost_per_sample * counts
        self.sums[stage].add(task, metrics.score(self.data.task, prediction, targets), counts, budget)
        return task.mean() + budget.mean()

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return self.losses(batch, "train")

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.losses(batch, "validation")

    def test_step(self, batch: Any, batch_index: int) -> None:
        self.losses(batch, "test")

    def begin(self, stage: str) -> None:
        """Start the stage's sums and its random numbers."""
        self.sums[stage] = metrics.EpochSums(self.data.task, self.device)
        torch.manual_seed(stage_seed(self.seed, stage, self.current_epoch if stage == "train" else 0))

    @property
    def learning_rate(self) -> float:
        """Of the current epoch: rising in equal steps from 0, constant, falling in equal steps to 0 after the last."""
        done, left = self.current_epoch + 1, self.protocol.epochs - self.current_epoch
        share = min(1.0, done / (self.protocol.warmup_epochs + 1), left / (self.protocol.decay_epochs + 1))
        return self.protocol.learning_rate * share

    def on_train_epoch_start(self) -> None:
        self.begin("train")
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate
        self.network.rnn.policy.set_epoch(self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        self.begin("validation")

    def on_test_epoch_start(self) -> None:
        self.begin("test")

    def on_validation_epoch_end(self) -> None:
        self.log_dict({key: self.results("validation")[key] for key in self.shown}, prog_bar=True, logger=False)

    @property
    def shown(self) -> tuple[str, str]:
        """The two figures that matter on the way."""
        return metrics.SCORES[self.data.task], "state_updates"

    def results(self, stage: str) -> dict[str, float]:
        """Means over the stage's examples since it began.

        Raises:
            DivergedError: the loss is nan or infinite.
        """
        results = self.sums[stage].results()
        if not torch.isfinite(torch.tensor(results["loss"])):
            raise DivergedError(
                f"the {stage} loss became {results['loss']} in epoch {self.current_epoch}: "
                "lower training.learning_rate, training.gradient_clip or, to stop before, training.epochs"
            )
        return results

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.identity  # plain values: a checkpoint says what it is, and loads with weights_only

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.protocol.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    def train_dataloader(self) -> Iterable:
        return _EpochBatches(self)

    def val_dataloader(self) -> Iterable:
        return self.data.evaluation_batches("validation")

    def test_dataloader(self) -> Iterable:
        return self.data.evaluation_batches("test")


class _EpochBatches:
    """The training batches of whichever epoch is current when the first is asked for.

    Not when the iterator is made: resuming, Lightning makes it before it has restored the epoch.
    """

    def __init__(self, module: SequenceModule):
        self.module = module

    def __len__(self) -> int:
        return len(self.module.data.training_batches(self.module.current_epoch))

    def __iter__(self):
        yield from self.module.data.training_batches(self.module.current_epoch)

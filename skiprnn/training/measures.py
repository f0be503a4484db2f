"""What is measured: task loss, λ * state updates, accuracy or squared error, FLOPs.

Shapes: B batch, T steps, H hidden, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from skiprnn.model.recurrent import Recurrent


def state_updates(updates: Tensor) -> Tensor:
    """Number of state updates of each sequence (B,): sum over steps, and mean over neurons where each one decides.

    Args:
        updates: (B, T) of a step policy or (B, T, H) of a neuron policy.
    """
    return updates.sum(1) if updates.dim() == 2 else updates.sum(1).mean(-1)


def task_loss(task: str, prediction: Tensor, targets: Tensor) -> Tensor:
    """Loss of each sequence (B,): cross-entropy of logits (B, C), or half the squared error of (B, 1).

    Half, because the authors' adding task minimises tf.nn.l2_loss: the published λ belong to that scale.
    """
    if task == "classification":
        return functional.cross_entropy(prediction, targets, reduction="none")
    return (prediction.squeeze(1) - targets).square() / 2


def score(task: str, prediction: Tensor, targets: Tensor) -> Tensor:
    """Of each sequence (B,): 1 where the largest logit is the target's, else 0; or the squared error."""
    if task == "classification":
        return (prediction.argmax(1) == targets).to(prediction.dtype)
    return (prediction.squeeze(1) - targets).square()


SCORES = {"classification": "accuracy", "regression": "mse"}  # what `score` averages to
BETTER = {"classification": max, "regression": min}


class Measured(NamedTuple):
    """Of each sequence of a batch, (B,) each."""

    task_loss: Tensor
    budget_loss: Tensor  # λ * state updates
    score: Tensor
    state_updates: Tensor

    @property
    def loss(self) -> Tensor:
        """What is minimised: the mean of both losses over the batch."""
        return self.task_loss.mean() + self.budget_loss.mean()


def measure(task: str, prediction: Tensor, updates: Tensor, targets: Tensor, cost_per_sample: float) -> Measured:
    """What a network did with a batch.

    Args:
        task: "classification" or "regression".
        prediction: (B, C), or (B, 1).
        updates: (B, T) or (B, T, H), see `state_updates`.
        targets: (B,).
        cost_per_sample: λ.
    """
    counts = state_updates(updates)
    losses = task_loss(task, prediction, targets), cost_per_sample * counts
    return Measured(*losses, score(task, prediction, targets), counts)


class EpochSums:
    """Sums over an epoch's examples, kept on the device so that no step waits for it; weighted by examples.

    Gives per-example means, so that batches of unequal size count as they should.
    """

    def __init__(self, task: str, device: torch.device):
        self.task = task
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)  # the last one counts the examples

    @property
    def examples(self) -> int:
        """That were added; waits for the device."""
        return int(self.sums[-1])

    def clear(self) -> None:
        """Begin anew, in the same memory, which a CUDA graph may add to."""
        self.sums.zero_()

    def add(self, batch: Measured) -> None:
        """Add what was measured of a batch."""
        entries = [*batch, batch.state_updates.double().square(), torch.ones_like(batch.state_updates)]
        self.sums += torch.stack([entry.detach().double().sum() for entry in entries])

    def results(self) -> dict[str, float]:
        """Means over examples; `state_updates_std` is the sample standard deviation over examples."""
        task, budget, scores, updates, squares, examples = self.sums.tolist()
        n = max(examples, 1)
        variance = max(squares - updates**2 / n, 0.0) / max(n - 1, 1)
        return {
            "loss": (task + budget) / n,
            "task_loss": task / n,
            "budget_loss": budget / n,
            SCORES[self.task]: scores / n,
            "state_updates": updates / n,
            "state_updates_std": variance**0.5,
        }


def inference_flops(rnn: Recurrent, updates: float, steps: int) -> float:
    """Multiplications of the recurrent network for one sequence, as the papers count them ([SKIP] section 4).

    An update costs what the cells and the policy say; neurons cost their share of a layer each.

    Args:
        rnn: the network.
        updates: mean state updates of a sequence, as `state_updates` counts them.
        steps: T.
    """
    per_update = sum(cell.flops_per_update() for cell in rnn.cells) + rnn.policy.flops_per_update()
    return updates * per_update + steps * rnn.policy.flops_per_step()

"""An LSTM that you have learns to skip: SkipLSTM.from_torch, then some epochs at a cost per state update.

    python examples/finetune_lstm.py

On scikit-learn's 8x8 digits, read four pixels a step, each step shown twice: an nn.LSTM is trained, a Skip LSTM begins
with its weights and is fine-tuned, and so for as many epochs is the LSTM itself. Printed: test accuracy and updates.
"""

import argparse
import copy
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from skiprnn import SkipLSTM


class Classifier(nn.Module):
    """Sequence x (B, T, I) -> logits (B, 10), from the last state of nn.LSTM or of what takes its place."""

    def __init__(self, rnn: nn.Module, readout: nn.Linear):
        super().__init__()
        self.rnn, self.readout = rnn, readout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and state updates (B, T): an nn.LSTM's are all."""
        _, (h, _), *updates = self.rnn(x)
        return self.readout(h[-1]), updates[0] if updates else torch.ones(x.shape[:2])


def train(network: Classifier, x: Tensor, y: Tensor, epochs: int, learning_rate: float, cost: float = 0.0) -> None:
    """Cross-entropy + λ * state updates; a gate, which is new, learns ten times as fast as the rest."""
    gate = [parameter for name, parameter in network.named_parameters() if ".policy." in name]
    rest = [parameter for name, parameter in network.named_parameters() if ".policy." not in name]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": gate, "lr": 10 * learning_rate}], lr=learning_rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            logits, updates = network(x[rows])
            loss = functional.cross_entropy(logits, y[rows]) + cost * updates.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def report(name: str, network: Classifier, x: Tensor, y: Tensor) -> None:
    logits, updates = network(x)
    accuracy = (logits.argmax(1) == y).double().mean()
    print(f"{name:<32} accuracy {accuracy:.3f}  state updates {updates.sum(1).mean():4.1f} of {x.shape[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=32, help="units (%(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="of the nn.LSTM (%(default)s)")
    parser.add_argument("--more", type=int, default=40, help="epochs of fine-tuning (%(default)s)")
    parser.add_argument("--cost", type=float, default=1e-2, help="λ: cost of a state update (%(default)s)")
    given = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, digits, test_size=400, stratify=digits, random_state=0)
    x, held_out = (torch.tensor(part, dtype=torch.float32).view(len(part), 16, 4) for part in parts[:2])
    x, held_out = x.repeat_interleave(2, 1), held_out.repeat_interleave(2, 1)
    y, truth = map(torch.tensor, parts[2:])

    network = Classifier(nn.LSTM(4, given.hidden, batch_first=True), nn.Linear(given.hidden, 10))
    train(network, x, y, given.epochs, 1e-2)
    report("nn.LSTM", network, held_out, truth)
    skipping = Classifier(SkipLSTM.from_torch(network.rnn), copy.deepcopy(network.readout))
    report("SkipLSTM.from_torch, as it is", skipping, held_out, truth)
    train(skipping, x, y, given.more, 2e-3, given.cost)
    report("SkipLSTM, fine-tuned to skip", skipping, held_out, truth)
    train(network, x, y, given.more, 2e-3)
    report("nn.LSTM, trained on as long", network, held_out, truth)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

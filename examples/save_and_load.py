"""Save a network, and a sequence's state in the midst of a skip; load both elsewhere and go on exactly.

python examples/save_and_load.py FOLDER
"""

import sys
from pathlib import Path

import torch

from skiprnn import SkipGRU


def save(path: Path, rnn: torch.nn.Module, options: dict) -> None:
    """Options and weights: what the constructor takes, and what training found."""
    torch.save({"options": options, "weights": rnn.state_dict()}, path)


def load(path: Path) -> SkipGRU:
    stored = torch.load(path, weights_only=True)  # nothing in the file is executed
    rnn = SkipGRU(**stored["options"])
    rnn.load_state_dict(stored["weights"])
    return rnn


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    options = {"input_size": 3, "hidden_size": 16, "num_layers": 2, "batch_first": True}
    rnn = SkipGRU(**options)
    with torch.no_grad():
        rnn.policy.bias.fill_(-2.0)  # as if it had learned to skip
        x = torch.randn(4, 100, 3)
        output, _, updates = rnn(x)
        _, h, _ = rnn(x[:, :50])
        save(folder / "network.pt", rnn, options)
        torch.save(h, folder / "state.pt")  # the gate's state is in it: h.gate_state

        elsewhere, state = load(folder / "network.pt"), torch.load(folder / "state.pt", weights_only=True)
        continued, _, late_updates = elsewhere(x[:, 50:], state)
    assert torch.equal(continued, output[:, 50:])
    assert torch.equal(late_updates, updates[:, 50:])
    print(f"went on exactly, at {late_updates.sum(1).mean():.0f} of 50 steps")


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))

"""Texts of different lengths, character by character: is a line prose or Python? And which characters are read?

    python examples/text_classification.py
    python examples/text_classification.py one.txt other.txt    # a class for each file, an example for each line

Without files, lines of docstrings and of code of Python's own library. The sequences go in packed, the longest of a
batch sets no other's time, and the updates come back packed as well.
"""

import argparse
import ast
import json.decoder
import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from skiprnn import SkipGRU

LONGEST, SHORTEST = 80, 12  # characters


class Classifier(nn.Module):
    """Packed character codes -> logits (B, C), packed updates."""

    def __init__(self, classes: int, hidden_size: int = 48):
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.rnn = SkipGRU(16, hidden_size)
        self.readout = nn.Linear(hidden_size, classes)

    def forward(self, codes: PackedSequence) -> tuple[Tensor, PackedSequence]:
        _, h, updates = self.rnn(codes._replace(data=self.embedding(codes.data)))
        return self.readout(h[-1]), updates


def prose_and_code() -> list[list[str]]:
    """Lines of docstrings, and of the functions below them, of modules that every Python has."""
    prose: set[str] = set()
    code: set[str] = set()
    for module in ("argparse", "ast", "random", "pathlib", "json.decoder", "typing", "inspect", "collections"):
        __import__(module)
        file = sys.modules[module].__file__
        tree = ast.parse(Path(file or json.decoder.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                prose |= set((ast.get_docstring(node) or "").splitlines())
            elif isinstance(node, ast.stmt):
                code |= set(ast.unparse(node).splitlines()[:1])
    return [sorted(prose), sorted(code - prose)]


def packed(texts: list[str]) -> PackedSequence:
    return pack_sequence([torch.tensor([min(ord(c), 127) for c in text]) for text in texts], enforce_sorted=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="a class each; Python's own prose and code if left out")
    parser.add_argument("--epochs", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--cost", type=float, default=1e-3, help="λ: cost of a character read (%(default)s)")
    given = parser.parse_args()
    try:
        classes = [file.read_text(errors="replace").splitlines() for file in given.files] or prose_and_code()
    except OSError as error:
        sys.exit(f"error: cannot read {error.filename}: {error.strerror}")
    lines = [[line.strip()[:LONGEST] for line in part if len(line.strip()) >= SHORTEST] for part in classes]
    least = min(map(len, lines))
    if len(lines) < 2 or least < 10:
        sys.exit(f"error: needs two files with ten lines of {SHORTEST} characters each; got {[len(x) for x in lines]}")
    random.seed(0)
    torch.manual_seed(0)
    examples = [(text, label) for label, part in enumerate(lines) for text in random.sample(part, least)]
    random.shuffle(examples)
    held_out, training = examples[: len(examples) // 5], examples[len(examples) // 5 :]
    network = Classifier(len(lines))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(given.epochs):
        random.shuffle(training)
        for start in range(0, len(training), 64):
            texts, labels = zip(*training[start : start + 64], strict=True)
            logits, updates = network(packed(list(texts)))
            loss = functional.cross_entropy(logits, torch.tensor(labels)) + given.cost * updates.data.sum() / len(texts)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        print(f"epoch {epoch + 1}/{given.epochs}  loss {loss.item():.3f}")
    texts, labels = zip(*held_out, strict=True)
    with torch.no_grad():
        logits, updates = network(packed(list(texts)))
    right = (logits.argmax(1) == torch.tensor(labels)).double().mean()
    print(f"held out: {right:.3f} of {len(texts)} lines right; characters read: {100 * updates.data.mean():.0f} %")
    for text, read in list(zip(texts, unpack_sequence(updates), strict=True))[:3]:
        print("   ", "".join(c if used else "·" for c, used in zip(text, read, strict=True)))


if __name__ == "__main__":
    main()

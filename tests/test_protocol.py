"""The training protocol, written down a second time in plain torch: runs must end with these weights and these numbers.

Taken from skiprnn are the batches, the weights at the start and the seed of the random numbers; network, loss, λ,
clipping, Adam and the course of an epoch are stated here anew, after the papers. Gates start low, so that steps are
skipped from the beginning.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from skiprnn.training import job, setup
from skiprnn.training.config import RunConfig
from skiprnn.training.folder import RunFolder
from skiprnn.training.module import SequenceModule, stage_seed

CLIP, RATE, COST, DROPOUT = 0.5, 0.02, 0.03, 0.25
RATES = [RATE / 2, RATE, RATE * 2 / 3, RATE / 3]  # of each epoch: one of warm-up, the last two falling
COSTS = [0.0, COST, COST, COST]  # λ of each epoch: the first is free
SETTINGS = [
    "training.epochs=4",
    "training.warmup_epochs=1",
    "training.decay_epochs=2",
    "training.cost_free_epochs=1",
    f"training.learning_rate={RATE}",
    f"training.gradient_clip={CLIP}",
    f"model.cost_per_sample={COST}",
    "model.hidden_size=5",
]
DATA = {  # three batches an epoch, the last of them incomplete where the examples are given
    "pixels": ["data=digits", "training.batch_size=500"],
    "adding": ["data=adding", "data.length=20", "data.batches_per_epoch=3", "training.batch_size=8"],
    "text": [
        *("data=imdb", "+data.reviews_per_class=10", "data.length=9", "data.padding=right", "data.mask_padding=true"),
        *("training.batch_size=7", "model.embedding_size=4", f"model.dropout={DROPOUT}"),
    ],
}

Weights = dict[str, Tensor]


def step_of_lstm(w: Weights, x: Tensor, state: list[Tensor]) -> list[Tensor]:
    h, c = state
    i, j, f, o = (x @ w["layers.0.weight_ih"].T + h @ w["layers.0.weight_hh"].T + w["layers.0.bias"]).chunk(4, 1)
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(j)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def step_of_gru(w: Weights, x: Tensor, state: list[Tensor]) -> list[Tensor]:
    (h,) = state
    r_x, z_x, candidate_x = (x @ w["layers.0.weight_ih"].T + w["layers.0.bias"]).chunk(3, 1)
    r_h, z_h, candidate_h = w["layers.0.weight_hh"].chunk(3)
    r, z = torch.sigmoid(r_x + h @ r_h.T), torch.sigmoid(z_x + h @ z_h.T)
    return [z * h + (1 - z) * torch.tanh(candidate_x + (r * h) @ candidate_h.T)]


def binary(probability: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    return probability + (probability.round() - probability).detach()


def recur(w: Weights, kind: str, x: Tensor, lengths: Tensor | None, epoch: int) -> tuple[Tensor, Tensor]:
    """The last state h (B, H) of x (B, T, I), and the state updates of each sequence (B,)."""
    policy, cell = kind.split("_")
    step, names = {"lstm": (step_of_lstm, "hc"), "gru": (step_of_gru, "h")}[cell]
    state = [w[f"layers.0.initial_{name}"].expand(len(x), -1) for name in names]
    q, s = torch.ones(len(x), 1), torch.zeros(len(x), 1)
    updates = []
    for t in range(x.shape[1]):
        candidate = step(w, x[:, t], state)
        if policy == "skip":
            accumulated = s + torch.minimum(q, 1 - s)
            u = binary(accumulated)
            proposed = torch.sigmoid(candidate[-1] @ w["policy.weight"] + w["policy.bias"]).unsqueeze(1)
            q, s = u * proposed + (1 - u) * q, (1 - u) * accumulated
        else:
            part = "policy.layers.0"
            a = x[:, t] @ w[f"{part}.weight_input"].T + w[f"{part}.weight_state"] * state[0] + w[f"{part}.bias"]
            u = binary((((1 + 0.04 * epoch) * a + 1) / 2).clamp(0, 1))
        if lengths is not None:
            u = u * (t < lengths).unsqueeze(1)
        state = [u * new + (1 - u) * old for new, old in zip(candidate, state, strict=True)]
        updates.append(u.mean(1))  # over the neurons, where each one decides
    return state[0], torch.stack(updates).sum(0)


@dataclass
class Batch:
    """What comes of one: (B,) each."""

    task_loss: Tensor
    score: Tensor  # accuracy, or the squared error
    updates: Tensor


def forward(w: Weights, run: RunConfig, batch, epoch: int, training: bool) -> Batch:
    inputs, targets, lengths = batch
    w = {name.removeprefix("network.").removeprefix("rnn."): value for name, value in w.items()}
    x = w["embedding.weight"][inputs] if "embedding.weight" in w else inputs
    h, updates = recur(w, run.model.name, x, lengths, epoch)
    if training and run.model.dropout:
        kept = torch.nn.functional.dropout(torch.ones_like(h), DROPOUT) > 0
        h = h * kept / (1 - DROPOUT)
    prediction = h @ w["readout.weight"].T + w["readout.bias"]
    if targets.is_floating_point():
        error = prediction[:, 0] - targets
        return Batch(0.5 * error**2, error**2, updates)
    own = prediction[range(len(targets)), targets]
    return Batch(prediction.exp().sum(1).log() - own, (prediction.max(1)[0] == own).float(), updates)


def means(batches: list[Batch], cost: float) -> dict[str, float]:
    """Over all examples."""
    task, score, updates = (torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.__annotations__)
    found = {"task_loss": task.mean(), "score": score.mean(), "state_updates": updates.mean()}
    found |= {"budget_loss": cost * updates.mean(), "loss": (task + cost * updates).mean()}
    return {name: value.item() for name, value in found.items()}


def expected(run: RunConfig, module: SequenceModule) -> tuple[Weights, list[dict], dict[str, float]]:
    """The weights at the end, train/... and validation/... of each epoch, and the results on the test set."""
    start = {name: value.detach().clone() for name, value in module.state_dict().items()}
    names = [name for name, _ in module.named_parameters()]
    w = {name: start[name].requires_grad_() for name in names}
    first = {name: torch.zeros_like(w[name]) for name in names}
    second = {name: torch.zeros_like(w[name]) for name in names}
    steps, rows = 0, []

    def evaluated(split: str, epoch: int, cost: float) -> dict[str, float]:
        with torch.no_grad():
            return means([forward(w, run, b, epoch, False) for b in module.data.evaluation_batches(split)], cost)

    for epoch, (rate, cost) in enumerate(zip(RATES, COSTS, strict=True)):
        torch.manual_seed(stage_seed(run.seed, "train", epoch))
        done = []
        for batch in module.data.training_batches(epoch):
            done.append(forward(w, run, batch, epoch, True))
            loss = done[-1].task_loss.mean() + cost * done[-1].updates.mean()
            gradients = dict(zip(names, torch.autograd.grad(loss, list(w.values())), strict=True))
            norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
            steps += 1
            for name in names:
                g = gradients[name] * min(1.0, CLIP / norm.item())
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                mean, square = first[name] / (1 - 0.9**steps), second[name] / (1 - 0.999**steps)
                w[name] = (w[name] - rate * mean / (square.sqrt() + 1e-8)).detach().requires_grad_()
        parts = {"train": means(done, cost), "validation": evaluated("validation", epoch, cost)}
        rows.append({f"{stage}/{key}": value for stage, part in parts.items() for key, value in part.items()})
    return w, rows, evaluated("test", len(RATES) - 1, COST)


def write_reviews(root: Path) -> None:
    """20 reviews for training, of which 17 are trained on, and 20 for test; of 3 to 12 words."""
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            folder = root / "imdb" / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for number in range(10):
                words = [f"w{(7 * number + 3 * k + (label == 'pos')) % 13}" for k in range(3 + number)]
                (folder / f"{number}_5.txt").write_text(" ".join(words))


@pytest.fixture
def low_gates(monkeypatch):
    """Runs begin with gates that skip."""
    make_module = setup.make_module

    def make(run: RunConfig) -> SequenceModule:
        module = make_module(run)
        policy = module.network.rnn.policy
        if run.model.policy == "skip":
            with torch.no_grad():
                policy.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(run.seed))
                policy.bias.fill_(-1.0)
        return module

    monkeypatch.setattr(setup, "make_module", make)


@pytest.mark.parametrize("seeds", [(0,), (1, 2)], ids=["alone", "side by side"])
@pytest.mark.parametrize(
    ("data", "model"),
    [("pixels", "skip_lstm"), ("pixels", "sa_gru"), ("adding", "skip_gru"), ("text", "skip_gru"), ("text", "sa_lstm")],
)
def test_runs_are_what_the_protocol_makes_of_them(data, model, seeds, small_run, tmp_path, monkeypatch, low_gates):
    if data == "text":
        monkeypatch.delenv("SKIPRNN_MIRROR", raising=False)
        write_reviews(tmp_path / "data")
    run = small_run(*SETTINGS, *DATA[data], f"model={model}", f"data_root={tmp_path / 'data'}")
    runs = [replace(run, seed=seed) for seed in seeds]
    wanted = [expected(one, setup.make_module(one)) for one in runs]
    records = job.train(runs)
    score = "mse" if data == "adding" else "accuracy"
    for one, (weights, rows, test), record in zip(runs, wanted, records, strict=True):
        folder = RunFolder(one)
        found = folder.checkpoint(folder.last)["state_dict"]
        differences = {name: (found[name] - value).abs().max().item() for name, value in weights.items()}
        assert differences == pytest.approx(dict.fromkeys(differences, 0.0), abs=2e-4 * RATE)
        told = pd.read_csv(folder.metrics_file)
        told.columns = told.columns.str.replace(score, "score")
        assert told[list(rows[0])].to_dict("records") == [pytest.approx(row, rel=1e-5) for row in rows]
        assert rows[-1]["train/state_updates"] < 0.8 * record["steps"]
        results = record["final"]["test"] | {"score": record["final"]["test"][score]}
        assert {name: results[name] for name in test} == pytest.approx(test, rel=1e-5)

"""What a user adds is never silently wrong: every engine setting, and the whole way from config to table."""

import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_readme import ROOT
from torch.nn.utils import parametrizations, prune

from skiprnn import evaluate, figures, publish, tables
from skiprnn.model import engines
from skiprnn.model.cells import CELLS, Cell, LSTMCell
from skiprnn.model.policies import POLICIES, Coordinator, Skip, straight_through_round
from skiprnn.model.recurrent import Recurrent
from skiprnn.papers import plan
from skiprnn.training import job

FAST = [name for name in engines.ENGINES if name != "reference"]


class OneGate(Cell):
    """h~ = tanh(W [x, h] + b)"""

    name, label, gates, state_names, initial_bias = "one_gate", "One gate", ("j",), ("h",), (0.0,)

    def step(self, projected, state):
        return (torch.tanh(projected + state[0] @ self.weight_hh.T),)


class Coupled(LSTMCell):
    """LSTM whose input gate is what the forget gate leaves."""

    name = "coupled"

    def step(self, projected, state):
        h, c = state
        _, j, f, o = (projected + h @ self.weight_hh.T).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(-f) * torch.tanh(j)
        return torch.tanh(c) * torch.sigmoid(o), c


class Eager(Skip):
    """Updates from 0.25 on."""

    name = "eager"

    def binarise(self, accumulated):
        return straight_through_round(accumulated + 0.25)


@pytest.fixture(autouse=True)
def added():
    """What a test adds to CELLS and POLICIES is gone after it."""
    before = [(known, dict(known)) for known in (CELLS, POLICIES)]
    CELLS.update({"one_gate": OneGate, "coupled": Coupled})
    POLICIES["eager"] = Eager
    yield
    for known, kinds in before:
        known.clear()
        known.update(kinds)


def by_hand(rnn: Recurrent, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, T, H) and updates (B, T) of one layer, one sequence and one step at a time, by the equations."""
    (cell,), policy = rnn.cells, rnn.policy
    outputs, updates = [], []
    for sequence in x:
        state = tuple(part[0] for part in cell.initial_state(1))
        q, s = 1.0, 0.0
        for sample in sequence:
            total = s + min(q, 1 - s)
            threshold = {"always": -1.0, "skip": 0.5, "eager": 0.25}[policy.name]
            u = total > threshold
            if u:
                weights = cell.weight_ih @ sample + cell.weight_hh @ state[0] + cell.bias
                if cell.name == "one_gate":
                    state = (torch.tanh(weights),)
                else:
                    i, j, f, o = weights.chunk(4)
                    f = f + 1
                    i = -f if cell.name == "coupled" else i
                    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(j)
                    state = (torch.tanh(c) * torch.sigmoid(o), c)
                if policy.name != "always":
                    q, s = torch.sigmoid(policy.weight @ state[-1] + policy.bias).item(), 0.0
            else:
                s = total
            outputs.append(state[0])
            updates.append(float(u))
    return torch.stack(outputs).view(*x.shape[:2], -1), torch.tensor(updates).view(x.shape[:2])


@pytest.mark.parametrize("engine", ["auto", "reference", *FAST])
@pytest.mark.parametrize(
    ("cell", "policy"),
    [("one_gate", "always"), ("one_gate", "skip"), ("coupled", "always"), ("coupled", "skip"), ("lstm", "eager")],
)
def test_what_is_new_is_computed_as_its_class_says_or_refused(cell, policy, engine):
    torch.manual_seed(0)
    rnn = Recurrent(cell, policy, 2, 5, engine=engine, dtype=torch.float64, batch_first=True)
    with torch.no_grad():
        if policy != "always":
            rnn.policy.bias.fill_(-1.0)  # it skips a good deal
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    if engine in FAST:
        new = {"one_gate": "OneGate", "coupled": "Coupled", "lstm": "Eager"}[cell]
        with pytest.raises(ValueError, match=f"the {engine} engine can't run this: it does not know .* {new}"):
            rnn(x)
        return
    if engine == "auto":
        engines._say_once.cache_clear()
        with pytest.warns(UserWarning, match="reference engine runs this, correctly but slowly") as said:
            rnn(x), rnn(x)
        assert len(said) == 1
    output, _, updates = rnn(x)
    expected_output, expected_updates = by_hand(rnn, x)
    torch.testing.assert_close(output, expected_output)
    assert torch.equal(updates.double(), expected_updates.double())
    assert (updates.mean() < 0.9) == (policy != "always")


class Biased(Coordinator):
    """A coordinator in favour of updates."""

    def forward(self, x, h):
        return super().forward(x, h) + 3


def with_biased_coordinators(rnn: Recurrent) -> None:
    for coordinator in rnn.policy.coordinators:
        coordinator.__class__ = Biased


def with_a_hook_on_coordinators(rnn: Recurrent) -> None:
    for coordinator in rnn.policy.coordinators:
        coordinator.register_forward_hook(lambda module, arguments, a: a + 3)


def with_another_step(rnn: Recurrent) -> None:
    step = rnn.cells[0].step
    rnn.cells[0].step = lambda projected, state: step(2 * projected, state)


def with_another_decision(rnn: Recurrent) -> None:
    rnn.policy.binarise = lambda accumulated: straight_through_round(accumulated + 0.25)


def with_normalised_weights(rnn: Recurrent) -> None:
    parametrizations.weight_norm(rnn.cells[0], "weight_hh")
    rnn.cells[0].parametrizations.weight_hh.original0.data.mul_(3)


CHANGES = [
    ("selective", with_biased_coordinators, "coordinator Biased"),
    ("selective", with_a_hook_on_coordinators, "coordinator Coordinator as it was changed"),
    ("always", with_another_step, "cell LSTMCell as it was changed"),
    ("skip", with_another_decision, "policy Skip as it was changed"),
    ("always", with_normalised_weights, "cell ParametrizedLSTMCell"),
]


@pytest.mark.filterwarnings("ignore:skiprnn's reference engine")
@pytest.mark.parametrize(("policy", "change", "named"), CHANGES)
def test_a_network_that_was_changed_runs_as_changed_or_is_refused(policy, change, named):
    torch.manual_seed(0)
    rnn, x = Recurrent("lstm", policy, 2, 5, dtype=torch.float64), torch.randn(3, 20, 2, dtype=torch.float64)
    with torch.no_grad():
        if policy == "skip":
            rnn.policy.bias.fill_(-1.0)
        plain = rnn(x)[0]
        change(rnn)
        changed = rnn(x)[0]
        assert not torch.allclose(plain, changed)
        rnn.engine = "reference"
        assert torch.equal(rnn(x)[0], changed)
        for rnn.engine in FAST:
            with pytest.raises(
                ValueError, match=f"the {rnn.engine} engine can't run this: it does not know the {named}"
            ):
                rnn(x)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("part", ["cell", "policy"])
def test_pruned_weights_are_refused_until_they_are_permanent(part, engine):
    """Pruning works by a hook of forward, which would leave the weights as they were when they were pruned."""
    rnn, x = Recurrent("lstm", "skip", 2, 5, engine=engine), torch.randn(3, 20, 2)
    pruned, name = (rnn.cells[0], "weight_hh") if part == "cell" else (rnn.policy, "weight")
    prune.l1_unstructured(pruned, name, 3)
    with pytest.raises(ValueError, match=f"^a hook computes weights of {type(pruned).__name__}, and engines call no"):
        rnn(x)
    prune.remove(pruned, name)
    rnn(x)
    assert (getattr(pruned, name) == 0).sum() == 3


def blocks() -> list[tuple[str, str]]:
    """Language and text of every block of the page, in order."""
    return re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:skiprnn's reference engine")
def test_the_page_from_class_to_table_figures_and_model_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for language, text in blocks():
        named = re.search(r"^# (\S+\.(?:py|yaml))\n", text, re.MULTILINE)
        if named:
            file = Path(named[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if language == "python":
            exec(compile(text, "docs/extending.md", "exec"), {"__name__": "extending"})
    arguments = ["experiment=mine", "profile=echo/short", *SMALL[2:], f"output={tmp_path / 'runs'}"]
    planned = plan.requested(arguments)[1]
    assert len(planned) == 4
    runs = [one.run for one in planned]
    for together in (runs[:2], runs[2:3], runs[3:]):  # the first row's seeds side by side
        job.train(together)
    tables.main(arguments)
    table = capsys.readouterr().out
    assert re.search(r"Skip LayerNorm LSTM \| .* 2 / 2", table)
    assert re.search(r"Eager Skip GRU +\| .* 2 / 2", table)
    figures.main([*arguments, f"publish={tmp_path / 'published'}"])
    drawn = {file.stem for file in (tmp_path / "published" / "figures").glob("*.png")}
    usage = {"usage-1-skip_norm_lstm_lambda0.001", "usage-2-eager_skip_gru_lambda0"}
    assert drawn == {"curves-layernorm-lstm", "curves-gru", "learning", "tradeoff"} | usage
    publish.main([*arguments, f"publish={tmp_path / 'published'}"])
    cards = {file.parent.name: file for file in (tmp_path / "published").rglob("checkpoints/**/README.md")}
    card = next(file for file in cards.values() if "eager" in str(file)).read_text()
    assert "Skip RNN with a lower threshold" in card
    assert "Twelve samples of noise" in card
    capsys.readouterr()
    evaluate.main([f"verify={tmp_path / 'published' / 'checkpoints'}", "device=cpu"])

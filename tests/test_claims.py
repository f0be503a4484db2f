"""Claims on made-up records on both sides of each statistic; the published page."""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import CONF, next_steps
from test_experiments import planned_runs

from skiprnn import claims as command
from skiprnn.papers import claims, experiments
from skiprnn.papers.claims import Evidence
from skiprnn.papers.experiments import Row
from skiprnn.papers.records import Results
from skiprnn.training.config import ConfigError

RESULTS, CLAIMS = Path(CONF).parent / "results", experiments.FOLDER / "claims.yaml"
CONFIG = {"data": {"drop_last": True}, "training": {"batch_size": 20, "train_batches": None}}


def record(accuracy=0.9, updates=400.0, mse=None) -> dict:
    """Of a run that has this at its best epoch, and nothing of it at the last."""
    best = {"accuracy": accuracy, "state_updates": updates} | ({} if mse is None else {"mse": mse})
    last = {"accuracy": 0.1, "state_updates": 784.0} | ({} if mse is None else {"mse": 1.0})
    facts = {"task": "classification" if mse is None else "regression", "steps": 784, "solved_at": 1 / 600}
    facts |= {"examples": {"train": 99}, "config": CONFIG}
    return facts | {"best": {"test": best}, "final": {"test": last}}


def curve(accuracies, seconds=2.0, **columns) -> pd.DataFrame:
    return pd.DataFrame({"validation/accuracy": accuracies, "seconds": seconds} | columns)


def row(records=(), diverged: int = 0, curves=()) -> Evidence:
    return Evidence(Results(Row("x"), "skip", 4, list(records), diverged), list(curves))


def outcomes(test: dict, *rows: Evidence) -> tuple[str, str]:
    """The verdicts at the best epoch and at the last."""
    return claims.evaluate(test, rows, "").verdict, claims.evaluate(test, rows, "last_").verdict


def with_accuracy(*values: float, **settings) -> Evidence:
    return row([record(accuracy=value) for value in values], **settings)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((0.97, 0.972, 0.975), (0.90, 0.93, 0.95), "holds"),
        ((0.90, 0.902, 0.904), (0.96, 0.961, 0.963), "does not hold"),
        ((0.93, 0.95, 0.97), (0.92, 0.95, 0.98), "undecided"),
        ((0.97, 0.972), (0.90, 0.93, 0.91), "too few runs"),
        ((0.97,), (0.90, 0.93, 0.95), "too few runs"),
    ],
)
def test_a_difference_of_means_against_a_bound(ours, theirs, expected):
    test = {"statistic": "mean", "metric": "accuracy", "above": -0.01}
    at_best, at_last = outcomes(test, with_accuracy(*ours), with_accuracy(*theirs))
    assert at_best == expected
    assert at_last == ("holds" if len(ours) > 2 else "too few runs")  # 0.1 both


@pytest.mark.parametrize(
    ("updates", "expected"),
    [((400, 410, 420), "holds"), ((560, 570, 580), "does not hold"), ((300, 470, 640), "undecided")],
)
def test_a_mean_against_a_bound(updates, expected):
    """60 % of 784 steps are 470."""
    test = {"statistic": "mean", "metric": "state_updates_percent", "below": 60}
    assert outcomes(test, row([record(updates=value) for value in updates])) == (expected, "does not hold")


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((30, 31, 32), "holds"), ((48, 49, 50), "does not hold"), ((38, 40, 42), "undecided")],
)
def test_twice_a_mean(ours, expected):
    """Twice the rate does not take twice the updates, 40."""
    test = {"statistic": "mean", "metric": "state_updates", "times": 2, "below": 0}
    once = row([record(updates=value) for value in (19, 20, 21)])
    assert outcomes(test, row([record(updates=value) for value in ours]), once)[0] == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(3.1, "holds"), (2.9, "undecided"), (1 / 2.9, "undecided"), (1 / 3.1, "does not hold"), (1, "undecided")],
)
def test_one_spread_below_another(ratio, expected):
    """F of 3 and 3 degrees of freedom is at 5 % from 9.277 on, a ratio of deviations of 3.046."""
    values = [0.90, 0.91, 0.92, 0.93]
    wider = [0.5 + ratio * (value - 0.5) for value in values]
    assert outcomes({"statistic": "spread", "metric": "accuracy"}, with_accuracy(*values), with_accuracy(*wider)) == (
        expected,
        "undecided",
    )


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([(90, 95, 99), (60, 70, 75), (20, 30, 40)], "holds"),
        ([(20, 30, 40), (60, 70, 75), (90, 95, 99)], "does not hold"),
        ([(60, 70, 75), (20, 95, 40), (90, 30, 99)], "undecided"),
        ([(50, 50, 50), (50, 50, 50), (50, 50, 50)], "undecided"),
        ([(90, 95, 99), (60, 70), (20, 30, 40)], "too few runs"),
    ],
)
def test_a_trend_over_rows(updates, expected):
    rows = [row([record(updates=value) for value in values]) for values in updates]
    assert outcomes({"statistic": "trend", "metric": "state_updates"}, *rows)[0] == expected


def reaching(*epochs: int | None, diverged: int = 0, **columns) -> Evidence:
    """Runs that are at 0.9 after so many epochs of ten."""
    curves = [curve([0.5 if epoch is None or n < epoch else 0.9 for n in range(1, 11)], **columns) for epoch in epochs]
    return row([record() for _ in epochs], diverged, curves)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((2, 3, 3, 4), (5, 6, None, None), "holds"),  # the least of 70 ways to part them
        ((2, 3, 4), (5, 6, 7), "holds"),  # one of 20
        ((2, 3, 6), (5, 7, 8), "undecided"),  # two of 20
        ((5, None, 7), (2, 3, 4), "does not hold"),
        ((None,) * 4, (None,) * 4, "undecided"),
        ((2, 3), (5, 6, 7), "too few runs"),
    ],
)
@pytest.mark.parametrize("unit", ["steps", "seconds"])
def test_time_to_an_accuracy(ours, theirs, expected, unit):
    test = {"statistic": "time", "reaching": 0.9, "in": unit}
    assert outcomes(test, reaching(*ours), reaching(*theirs)) == (expected, expected)


def test_steps_and_seconds_until_an_accuracy_is_reached():
    """99 examples are four whole batches of twenty and a part; the processor's seconds count where they are known."""
    curves = curve([0.5, 0.8, 0.9, 0.7], seconds=[10.0, 1, 1, 1], cpu_seconds=[1.0, 2, 3, 4])
    evidence = row([record()], curves=[curves])
    assert claims.reached(evidence, curves, 0.9, "steps") == 3 * 4
    assert claims.reached(evidence, curves, 0.9, "seconds") == 12
    assert math.isinf(claims.reached(evidence, curves, 0.91, "steps"))
    evidence.results.records[0]["config"] = CONFIG | {"data": {}}
    assert claims.reached(evidence, curves, 0.9, "steps") == 3 * 5
    evidence.results.records[0]["config"] = CONFIG | {"training": {"batch_size": 20, "train_batches": 2}}
    assert claims.reached(evidence, curves, 0.9, "steps") == 3 * 2
    test = {"statistic": "time", "reaching": 0.9, "in": "seconds"}
    known, unknown = reaching(2, 2, 2, cpu_seconds=5.0), reaching(3, 3, 3)
    assert claims.evaluate(test, [known, known], "").measured == "median 10 (3 of 3 runs) against 10 (3 of 3 runs)"
    assert claims.evaluate(test, [known, unknown], "").measured == "median 4 (3 of 3 runs) against 6 (3 of 3 runs)"


def test_seconds_that_runs_share_are_nobodys(tmp_path):
    """Where a run was trained beside others, or nobody knows where, its steps count, its seconds do not."""
    experiment = experiments.load("table1")
    (file, *_) = sorted((RESULTS / "table1" / "records").glob("*/gru/*.json"))
    content, epochs = json.loads(file.read_bytes()), file.with_suffix(".csv").read_bytes()
    (tmp_path / "records/mnist/gru").mkdir(parents=True)
    alone, shared = {"device": "x", "engine": "y", "pack": 1}, {"device": "x", "engine": "y", "pack": 6}
    counted = {}
    for name, places in {"old": None, "own": [alone], "shared": [alone, shared], "unknown": []}.items():
        run = content if places is None else content | {"places": places}
        copy = tmp_path / "records/mnist/gru/run.json"
        copy.write_text(json.dumps(run))
        copy.with_suffix(".csv").write_bytes(epochs)
        evidence = claims.published(experiment, tmp_path)["GRU"]
        counted[name] = [evidence.runs({"statistic": "time", "in": unit}) for unit in ("steps", "seconds")]
    assert counted == {"old": [1, 1], "own": [1, 1], "shared": [1, 0], "unknown": [1, 0]}


def test_a_time_is_tested_on_the_runs_that_have_it():
    test = {"statistic": "time", "reaching": 0.9, "in": "seconds"}
    own, shared = reaching(2, 2, 2, cpu_seconds=5.0), reaching(9)
    shared.curves[0] = shared.curves[0].drop(columns="seconds")
    both = row([record()] * 4, curves=own.curves + shared.curves)
    assert claims.evaluate(test, [both, own], "").measured == "median 10 (3 of 3 runs) against 10 (3 of 3 runs)"
    assert claims.evaluate(test, [shared, own], "").verdict == "too few runs"
    assert claims.evaluate(test | {"in": "steps"}, [both, both], "").measured.startswith("median 8 (4 of 4 runs)")


@pytest.mark.parametrize(
    ("errors", "by_all", "by_none"),
    [
        ((1e-4, 1e-3, 1e-3), "holds", "does not hold"),
        ((0.1, 0.1, 0.002), "does not hold", "holds"),
        ((1e-4, 0.1, 0.1), "undecided", "undecided"),
        ((1e-4, 1e-4), "too few runs", "too few runs"),
    ],
)
def test_solved_by_all_or_by_none(errors, by_all, by_none):
    evidence = row([record(mse=error) for error in errors])
    found = [outcomes({"statistic": "solved", "by": by}, evidence) for by in ("all", "none")]
    assert [best for best, _ in found] == [by_all, by_none]
    if len(errors) > 2:
        assert [last for _, last in found] == ["does not hold", "holds"]


def test_diverged_runs_count():
    """As unsolved, as never there; a mean without them says nothing."""
    solved = [record(mse=1e-4) for _ in range(3)]
    assert outcomes({"statistic": "solved", "by": "all"}, row(solved, diverged=1))[0] == "undecided"
    assert outcomes({"statistic": "solved", "by": "none"}, row(diverged=3))[0] == "holds"
    test = {"statistic": "time", "reaching": 0.9, "in": "steps"}
    assert outcomes(test, reaching(2, 3, 3), reaching(6, 7, 8, diverged=1))[0] == "holds"
    assert outcomes(test, reaching(2, 3, diverged=1), reaching(6, 7, 8))[0] == "undecided"
    test = {"statistic": "mean", "metric": "accuracy", "above": -0.01}
    high, low = with_accuracy(0.97, 0.97, 0.97), with_accuracy(0.9, 0.9, 0.9, diverged=1)
    assert outcomes(test, high, low)[0] == "undecided"


def test_a_claim_is_what_its_tests_are_together():
    assert claims._together(["holds", "holds"]) == "holds"
    assert claims._together(["holds", "undecided"]) == "undecided"
    assert claims._together(["undecided", "too few runs", "holds"]) == "too few runs"
    assert claims._together(["too few runs", "does not hold", "holds"]) == "does not hold"
    assert claims._together([]) == "not tested"


# the file, from records to the page


def publish(results: Path, rows: dict[str, list[tuple[float, float, int]]]) -> None:
    """Records and metrics per epoch of Table I's rows: (accuracy, updates, epochs until 0.9) of each run."""
    for label, runs in rows.items():
        planned = [one.run for one in planned_runs("table1", "mnist/paper") if one.row.label == label]
        for run, (accuracy, updates, epochs) in zip(planned, runs, strict=False):
            file = results / "table1" / "records" / f"{run.name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            measured = {"accuracy": accuracy, "state_updates": updates}
            test = {"validation": measured, "test": measured | {"inference_flops": 1.0}}
            facts = {"steps": 784, "solved_at": None, "input_flops": 0.0, "examples": {"train": 55000}}
            file.write_text(
                json.dumps(facts | {"profile": run.profile, "config": run.identity, "best": test, "final": test})
            )
            curve([0.1] * (epochs - 1) + [0.95]).to_csv(file.with_suffix(".csv"), index_label="epoch")


def as_claimed(cell: str) -> dict[str, list[tuple[float, float, int]]]:
    skip, always, random = (f"Skip {cell}, λ = 1e-4", cell, f"{cell} (p_skip = 0.5)")
    return {
        skip: [(0.970, 370, 3), (0.971, 390, 4), (0.972, 400, 3), (0.975, 380, 4)],
        always: [(0.85, 784, 9), (0.91, 784, 8), (0.95, 784, 12), (0.93, 784, 10)],
        random: [(0.89, 392, 9), (0.90, 392, 9), (0.89, 392, 9), (0.90, 392, 9)],
    }


def table_1(results: Path) -> list[str]:
    """The verdicts on the claims that Table I carries."""
    return [claim.best for claim in claims.read(results)[:4]]


def test_claims_hold_on_records_as_claimed(tmp_path):
    publish(tmp_path, as_claimed("LSTM") | as_claimed("GRU"))
    assert table_1(tmp_path) == ["holds"] * 4
    page = claims.markdown(claims.read(tmp_path))
    assert "| Accuracy of Skip LSTM, λ = 1e-4 minus that of LSTM is above -0.01 " in page
    assert "| +0.062 [" in page
    assert "median 749 (4 of 4 runs) against 2,033 (4 of 4 runs)" in page  # 3.5 and 9.5 epochs of 214 steps
    run = next(one.run for one in planned_runs("table1", "mnist/paper"))
    assert f"| table1         | {run.profile['note']} " in page


def test_claims_do_not_hold_on_records_that_say_the_contrary(tmp_path):
    contrary = as_claimed("GRU")
    skip, always, random = contrary
    contrary = {skip: [(a, 784, n) for a, _, n in contrary[always]], always: contrary[skip], random: contrary[skip]}
    publish(tmp_path, as_claimed("LSTM") | contrary)
    assert table_1(tmp_path) == ["does not hold"] * 4


def test_claims_are_undecided_without_enough_runs(tmp_path):
    complete = as_claimed("LSTM") | as_claimed("GRU")
    publish(tmp_path, complete | {"GRU": complete["GRU"][:2]})
    assert table_1(tmp_path) == ["too few runs"] * 3 + ["holds"]
    assert {claim.best for claim in claims.read(tmp_path)[4:]} == {"too few runs", "not tested"}


def test_every_claim_names_rows_that_there_are_and_states_its_source(tmp_path):
    found = claims.read(tmp_path)
    assert len(found) == 11
    for claim in found:
        assert claim.text
        assert "RNN" in claim.source
    content = experiments.read(CLAIMS)
    assert set(content["records"]) == {experiment.name for experiment in experiments.published()}
    tested = {test["statistic"] for entry in content["claims"] for test in entry["tests"]}
    assert tested == set(claims.STATISTICS)


def test_a_row_that_an_experiment_lacks_is_named(tmp_path, monkeypatch):
    content, read = experiments.read(CLAIMS), experiments.read
    content["claims"][0]["tests"][0]["minus"] = "RNN"
    monkeypatch.setattr(experiments, "read", lambda file: content if file == CLAIMS else read(file))
    with pytest.raises(ConfigError, match="claims: table1 has no row 'RNN'"):
        claims.read(tmp_path)


def test_runs_of_two_protocols_are_no_row(tmp_path):
    publish(tmp_path, as_claimed("LSTM"))
    run = next(one.run for one in planned_runs("table1", "mnist/paper"))
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, epochs=700))
    file = tmp_path / "table1" / "records" / f"{longer.name}.json"
    file.write_text(json.dumps({"config": longer.identity, "error": "DivergedError: nan"}))
    with pytest.raises(SystemExit, match=r"error: .*table1: the runs of LSTM differ in more than the seed"):
        command.main([str(tmp_path)])
    file.write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*\.json is damaged; delete it"):
        command.main([str(tmp_path)])
    assert not (tmp_path / "claims.md").exists()


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    command.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "claims.md").read_text())
    assert f"written to {tmp_path / 'claims.md'}" in printed
    assert "Next: " not in printed
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "model.safetensors").touch()
    command.main([str(tmp_path)])
    assert next_steps(capsys.readouterr().out) == [["evaluate", f"verify={tmp_path}"]]
    with pytest.raises(SystemExit, match=r"error: .*nowhere: there is no such folder"):
        command.main([str(tmp_path / "nowhere")])


def test_the_published_page_is_what_the_records_say():
    assert (RESULTS / "claims.md").read_text() == claims.markdown(claims.read(RESULTS)), "make claims"

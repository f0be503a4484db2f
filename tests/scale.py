"""How long a sweep of 10,000 runs takes to plan, scan and show: made-up records, the real code.

python tests/scale.py [RUNS] prints seconds.
"""

import csv
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import hydra
import numpy as np

from skiprnn.papers import plan, statistics, table
from skiprnn.papers.experiments import Experiment
from skiprnn.papers.plan import PlannedRun
from skiprnn.training.config import packaged
from skiprnn.views import page

EPOCHS = 30


def grid(output: Path, runs: int) -> list[list[str]]:
    """λ × p_skip × seeds × data sets: half of the runs are Skip RNN's, half random baselines, in rows of five seeds."""
    common = [f"output={output}", f"training.epochs={EPOCHS}", "training.cost_free_epochs=0"]
    settings = np.linspace(0, 1, max(1, runs // 40)).tolist()
    data, cells, seeds = ("digits", "mnist"), ("lstm", "gru"), range(5)
    return [
        [f"data={name}", f"model={kind}_{cell}", f"{key}={scale * setting:.6g}", f"seed={seed}", *common]
        for kind, key, scale in (("skip", "model.cost_per_sample", 1e-3), ("random_skip", "model.p_skip", 1.0))
        for name, cell, setting, seed in product(data, cells, settings, seeds)
    ]


def finish(one: PlannedRun, epochs: int = EPOCHS) -> None:
    """The run folder of a run that is so many epochs long: complete after EPOCHS of them."""
    rng, folder = np.random.default_rng(int(one.run.hash, 16)), one.folder
    accuracy, updates = np.sort(rng.uniform(0.1, 0.98, epochs)), rng.uniform(100, 700, epochs)
    folder.path.mkdir(parents=True)
    with (folder.path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{stage}/{key}" for stage in ("train", "validation") for key in ("loss", "accuracy", "state_updates")]
        writer.writerow(["epoch", "learning_rate", *names, "examples_per_second", "seconds"])
        for epoch, (a, u) in enumerate(zip(accuracy, updates, strict=True)):
            writer.writerow([epoch, 1e-3, 1 - a, a, u, 1 - a, a, u, 1234.5, 1.5])
    folder.last.touch()
    if epochs == EPOCHS:
        test = {"accuracy": accuracy[-1], "state_updates": updates[-1], "inference_flops": 1e5 * updates[-1]}
        best = {"epoch": epochs - 1, "train": test, "validation": test, "test": test}
        facts = {
            "seconds": 1.5 * epochs,
            "steps": 784,
            "solved_at": None,
            "input_flops": 0.0,
            "best": best,
            "final": best,
        }
        folder.finish({"name": one.run.name, "config": one.run.identity} | facts)


@contextmanager
def told(what: str) -> Iterator[None]:
    start, processor = time.perf_counter(), time.process_time()
    yield
    passed, used = time.perf_counter() - start, time.process_time() - processor
    print(f"{what}: {passed:.1f} s, {used:.1f} s of the processor", flush=True)


def planned_runs(combinations: Sequence[Sequence[str]]) -> list[PlannedRun]:
    """The runs of a grid, by Hydra's composition."""
    with hydra.initialize_config_dir(str(packaged("conf")), version_base="1.3"):
        return plan.runs(None, combinations, lambda overrides: hydra.compose("config", list(overrides)))


def main(runs: int) -> None:
    """Time each part."""
    with tempfile.TemporaryDirectory() as folder:
        with told(f"plan {runs} runs"):
            planned = planned_runs(grid(Path(folder), runs))
        with told("write made-up records"):
            for one in planned:
                finish(one)
        planned = planned_runs(grid(Path(folder), runs))
        with told("scan: which are complete, how far are the others"):
            assert sum(one.folder.complete for one in planned) == len(planned)
            assert sum(one.folder.epochs_done() for one in planned) == EPOCHS * len(planned)
        with told("note the plan for who watches"):
            plan.save_plan(None, "scale", planned)
        with told("table: " + str(len({one.row.label for one in planned})) + " rows"):
            experiment = Experiment("", "", "", ())
            table.layout(experiment, statistics.rows(experiment, planned))
        with told("page"):
            html = page.html(Path(folder), print)
        print(f"the page has {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)

"""Run records and checkpoints -> pictures: PDF for the paper, PNG for the screen.

    python -m skiprnn.figures experiment=table1 profile=mnist/cpu [publish=results/mnist-cpu]

In a folder `figures` beside the experiment's table:

tradeoff         test score against state updates, a curve per model over λ or p_skip
curves-LSTM      validation score and state updates by epoch, mean and range over the seeds ([SKIP] figure 2)
usage-ROW        what a Skip RNN reads of test sequences, red, and skips, blue ([SKIP] figures 3, 5 and 6)
neurons-ROW      which neurons an SA-RNN updates at every step of a test sequence

Complete runs alone; usage and neurons are of the row's run with the best validation score.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track

from skiprnn.data.base import DataError
from skiprnn.model.cells import CELLS
from skiprnn.model.policies import POLICIES
from skiprnn.papers import plan
from skiprnn.papers.experiments import Experiment
from skiprnn.papers.plan import PlannedRun
from skiprnn.training import measures as metrics
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, read_metrics, write_atomically
from skiprnn.training.job import load
from skiprnn.training.module import SequenceModule
from skiprnn.views import samples as usage
from skiprnn.views.samples import STYLE, WIDTH

BASELINE, RANDOM = "#000000", "#888888"
PALETTE = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: the colour-blind tell
SCORES = {"accuracy": "accuracy", "mse": "squared error"}


@dataclass
class Row:
    """A row of the plan that has complete runs."""

    number: int  # in the plan, from 1
    runs: list[RunFolder]
    records: list[dict[str, Any]]

    @property
    def run(self) -> RunConfig:
        """One of them; they differ in the seed."""
        return self.runs[0].run

    @property
    def name(self) -> str:
        """Of the model, as the papers write it: "Skip LSTM"."""
        model = self.run.model
        return POLICIES[model.policy].label.format(CELLS[model.cell].label)

    @property
    def budget(self) -> str:
        """ "λ = 1e-4", "p = 0.5", or nothing."""
        model = self.run.model
        if model.p_skip is not None:
            return f"p = {model.p_skip:g}"
        mantissa, exponent = f"{model.cost_per_sample:e}".split("e")
        short = f"{float(mantissa):g}e{int(exponent)}" if model.cost_per_sample else "0"
        return f"λ = {short}" if POLICIES[model.policy].learned else ""

    @property
    def score(self) -> str:
        """What is measured: "accuracy" or "mse"."""
        return metrics.SCORES[self.records[0]["task"]]

    def test(self, metric: str) -> tuple[float, float]:
        """Mean and sample standard deviation (0 for a single run) over the runs, on the test set at the best epoch."""
        values = np.array([record["best"]["test"][metric] for record in self.records])
        return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0

    def epochs(self, metric: str) -> np.ndarray | None:
        """A validation metric, (runs, epochs), of the runs whose metrics.csv has all epochs; None if none has."""
        files = [run.metrics_file for run in self.runs if run.metrics_file.exists()]
        columns = [read_metrics(file)[f"validation/{metric}"] for file in files]
        most = max(map(len, columns), default=0)
        return np.stack([column for column in columns if len(column) == most]) if most else None

    def best(self) -> RunFolder:
        """The run with the best validation score.

        Raises:
            ConfigError: its checkpoint is not here; another run's would not show what the row can do.
        """
        scores = [(record["best"]["validation"][self.score], number) for number, record in enumerate(self.records)]
        run = self.runs[(min(scores) if self.score == "mse" else max(scores))[1]]
        if not run.best.exists():
            raise ConfigError(f"{run.path}: the record is here, the checkpoint is not")
        return run


def complete(planned: Sequence[PlannedRun]) -> list[Row]:
    """The rows that have complete runs, in the plan's order."""
    groups = [
        [one.folder for one in group if one.folder.complete] for _, group in groupby(planned, lambda one: one.row)
    ]
    return [Row(n, runs, [run.record() for run in runs]) for n, runs in enumerate(groups, start=1) if runs]


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that are comparable: those that differ in more than policy and budget go into panels of their own.

    Returns:
        The rows of each panel by its title, the cell and whatever else is special about it: "LSTM, length = 400".
    """
    own = ("model.name", "model.cell", "model.policy", "model.cost_per_sample", "model.p_skip", "seed")
    flat = pd.json_normalize([row.run.identity for row in rows]).drop(columns=list(own)).astype(str)
    varying = flat.loc[:, flat.nunique() > 1]
    found: dict[str, list[Row]] = {}
    for row, (_, settings) in zip(rows, varying.iterrows(), strict=True):
        special = [f"{str(key).rpartition('.')[2]} = {value}" for key, value in settings.items()]
        found.setdefault(", ".join([CELLS[row.run.model.cell].label, *special]), []).append(row)
    return found


@matplotlib.rc_context(STYLE)
def tradeoff(rows: Sequence[Row]) -> Figure:
    """Test score against state updates, mean ± standard deviation over the runs.

    Raises:
        ConfigError: no model has two budgets.
    """
    found = panels(rows)
    if all(len(group) < 2 for members in found.values() for group in by_policy(members).values()):
        raise ConfigError("no model has complete runs with two values of λ or p_skip")
    figure = Figure((WIDTH, 0.6 + 1.6 * len(found)))
    one_axis = len({row.records[0]["steps"] for row in rows}) == 1
    column = figure.subplots(len(found), sharex=one_axis, squeeze=False)[:, 0]
    for axes, (title, members) in zip(column, found.items(), strict=True):
        steps, score = members[0].records[0]["steps"], members[0].score
        axes.set_yscale("log" if score == "mse" else "linear")
        for policy, group in by_policy(members).items():
            _tradeoff_curve(axes, policy, group)
        axes.margins(y=0.12)
        low, high = axes.get_ylim()
        if score == "mse" and high < 1.1 * low:  # matplotlib leaves a lone point on a logarithmic axis no room at all
            axes.set_ylim(low / 2, high * 2)
        axes.set(title=title, xlabel=f"state updates, of {steps} steps", ylabel=f"test {SCORES[score]}")
        axes.set_xlim(0, 1.04 * steps)
        if one_axis:
            axes.label_outer()
    handles = {text: line for axes in column for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each policy."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row.run.model.policy, []).append(row)
    return models


def colour(policy: str) -> str:
    """Black and grey for what does not learn, the palette's next for each policy that does; a second one of a kind
    without learning has one of the palette, too."""
    colours: dict[str, str] = {}
    others = cycle(PALETTE)
    kinds = set()
    for name, kind in POLICIES.items():
        first = (kind.family, kind.draws) not in kinds
        plain = None if kind.learned or not first else RANDOM if kind.draws else BASELINE
        colours[name] = plain or next(others)
        if plain:
            kinds.add((kind.family, kind.draws))
    return colours[policy]


def curve_label(policy: str) -> str:
    """Of a policy's points: what it is, and what stands beside them."""
    kind = POLICIES[policy]
    if kind.draws:
        return f"random {kind.family}s, p_skip at the points"
    return f"{kind.label.format('RNN')}, λ at the points" if kind.learned else kind.label.format("RNN")


def _tradeoff_curve(axes: Axes, policy: str, rows: Sequence[Row]) -> None:
    """One model's points, each with its budget beside it."""
    points = sorted((row.test("state_updates") + row.test(row.score), row.budget) for row in rows)
    x, x_error, y, y_error = np.array([point for point, _ in points]).T
    style: dict[str, Any] = {
        "color": colour(policy),
        "linewidth": 1,
        "elinewidth": 0.6,
        "marker": "o",
        "markersize": 3,
    }
    axes.errorbar(x, y, y_error, x_error, label=curve_label(policy), **style)
    edge = 0.1 * rows[0].records[0]["steps"]  # left of it a text would run into the axis
    for number, (_, budget) in enumerate(points):
        side = 1 if POLICIES[policy].draws or x[number] < edge else -1
        beside = min(max(number + side, 0), len(points) - 1)
        axes.annotate(
            budget.rpartition(" ")[2],
            (x[number], y[number]),
            (3 * side, -6 if y[beside] > y[number] else 3),  # the curve leaves room below it where it comes from above
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=5,
        )


@matplotlib.rc_context(STYLE)
def curves(rows: Sequence[Row]) -> Figure:
    """Validation score and state updates by epoch: mean, and the range over the seeds.

    The legend says so where only some of a row's complete runs have their metrics.csv.

    Raises:
        ConfigError: no run has its metrics.csv, or of one epoch only.
    """
    rows = [row for row in rows if (done := row.epochs("state_updates")) is not None and done.shape[1] > 1]
    if not rows:
        raise ConfigError("a curve needs metrics.csv of two epochs")
    figure = Figure((WIDTH, 3.2 + 0.09 * len(rows)))
    upper, lower = figure.subplots(2, sharex=True)
    score = rows[0].score
    for row, colour in zip(rows, shades(rows), strict=True):
        for axes, metric in ((upper, score), (lower, "state_updates")):
            values = row.epochs(metric)
            assert values is not None
            shown, epochs = len(values), np.arange(1, values.shape[1] + 1)
            some = f"{shown} of {len(row.runs)} runs" if shown < len(row.runs) else ""
            label = ", ".join(filter(None, (row.name, row.budget, some)))
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(epochs, values.mean(0), color=colour, label=label)
    upper.set_ylabel(f"validation {SCORES[score]}")
    upper.set_yscale("log" if score == "mse" else "linear")
    lower.set(xlabel="epoch", ylabel="state updates", ylim=(0, None))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def shades(rows: Sequence[Row]) -> list[np.ndarray]:
    """A colour per row: its policy's, paler for the first rows of that policy."""
    colours = []
    policies = [row.run.model.policy for row in rows]
    for index, policy in enumerate(policies):
        paleness = 0.7 * (policies[index:].count(policy) - 1) / max(policies.count(policy) - 1, 1)
        colours.append(np.array(to_rgb(colour(policy))) * (1 - paleness) + paleness)
    return colours


def pictures(rows: Sequence[Row]) -> Iterator[tuple[str, Callable[[], Figure | str]]]:
    """Name and drawing of each figure, or of an HTML page, that the rows ask for.

    The drawings raise ConfigError or DataError where something is missing.
    """
    yield "tradeoff", partial(tradeoff, rows)
    for title, members in panels(rows).items():
        yield f"curves-{re.sub(r'[^a-z0-9.]+', '-', title.lower())}", partial(curves, members)
    for row in rows:
        name = f"{row.number}-{row.run.row}"
        draw = usage.of_policy(POLICIES[row.run.model.policy])
        if draw:
            yield f"{draw.__name__}-{name}", partial(of_best, row, draw)
        if draw is usage.usage and row.run.data["name"] == "imdb":
            yield f"usage-{name}", partial(of_best, row, usage.words_page)


def of_best(row: Row, draw: Callable[[SequenceModule], Figure | str]) -> Figure | str:
    """A picture of the row's best run, from its checkpoint."""
    run = row.run
    return draw(load(row.best().best, data_root=run.data_root, device=run.device, threads=run.threads))


@matplotlib.rc_context(STYLE)
def write(picture: Figure | str, stem: Path) -> list[Path]:
    """Write a figure as PDF and PNG, or a page as HTML; returns the files."""
    if isinstance(picture, str):
        contents = {".html": picture.encode()}
    else:
        contents = {}
        for suffix, volatile in ((".pdf", "CreationDate"), (".png", "Software")):
            buffer = io.BytesIO()
            picture.savefig(buffer, format=suffix[1:], metadata={volatile: None})  # the same bytes each time
            contents[suffix] = buffer.getvalue()
    files = [stem.with_name(stem.name + suffix) for suffix in contents]
    for file, content in zip(files, contents.values(), strict=True):
        write_atomically(file, content)
    return files


def publish(experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None) -> str:
    """Draw what the complete runs allow; returns what was written, and what was left out and why.

    Args:
        experiment, planned: as from skiprnn.papers.plan.
        folder: of the experiment's table, below which the figures go; None: where skiprnn.tables puts it.

    Raises:
        ConfigError: no run is complete.
    """
    rows = complete(planned)
    if not rows:
        raise ConfigError(f"output={planned[0].run.output}: none of the {len(planned)} runs is complete")
    target = (folder or experiment.folder(planned[0].run)) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    done = sum(len(row.runs) for row in rows)
    lines = [f"{done} of {len(planned)} runs are complete; figures in {target}/"]
    for name, draw in track(list(pictures(rows)), "drawing", transient=True, console=Console(stderr=True)):
        try:
            lines += [f"  {file.name}" for file in write(draw(), target / name)]
        except (ConfigError, DataError) as error:
            lines.append(f"  left out: {name}: {str(error).splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Draw an experiment's figures from the records and checkpoints that exist."""
    try:
        experiment, planned, folder = plan.requested(arguments)
        if not experiment:
            raise ConfigError("experiment=NAME is missing: which figures?")
        print(publish(experiment, planned, folder))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

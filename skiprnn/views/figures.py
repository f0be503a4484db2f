"""Run records and checkpoints -> pictures: PDF for the paper, PNG for the screen.

In a folder `figures` beside the experiment's table:

tradeoff         test score against state updates, λ by shade, and the published numbers
learning         validation score against training steps and, where they are a run's own, seconds of training
curves-LSTM      validation score and state updates by epoch, mean and range over the seeds ([SKIP] figure 2)
usage-ROW        what a Skip RNN reads of test sequences, red, and skips, blue ([SKIP] figures 3, 5 and 6)
neurons-ROW      which neurons an SA-RNN updates at every step of a test sequence

Complete runs alone; usage and neurons are of the row's run with the best validation score.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track

from skiprnn.data.base import DataError
from skiprnn.model.cells import CELLS
from skiprnn.model.policies import POLICIES
from skiprnn.papers.experiments import Experiment
from skiprnn.papers.experiments import Row as PlannedRow
from skiprnn.papers.plan import PlannedRun
from skiprnn.papers.records import SECONDS, read_curves, steps_per_epoch, weights_file
from skiprnn.training import measures as metrics
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.module import SequenceModule
from skiprnn.training.setup import load
from skiprnn.views import samples as usage
from skiprnn.views import style
from skiprnn.views.curves import Curves, clock, spread
from skiprnn.views.style import STYLE, WIDE, WIDTH

SCORES = {"accuracy": "accuracy", "mse": "squared error"}
SHADES = 6  # of a policy that the legend of a trade-off shows


@dataclass
class Row:
    """A row of the plan that has complete runs."""

    number: int  # in the plan, from 1
    planned: PlannedRow
    runs: list[RunFolder]
    records: list[dict[str, Any]]
    folder: Path | None = None  # of published results, where weights may be that are not in the run's folder

    @property
    def run(self) -> RunConfig:
        """One of them; they differ in the seed."""
        return self.runs[0].run

    @property
    def score(self) -> str:
        """What is measured: "accuracy" or "mse"."""
        return metrics.SCORES[self.records[0]["task"]]

    def test(self, metric: str) -> tuple[float, float]:
        """Mean and sample standard deviation (0 for a single run) over the runs, on the test set at the best epoch."""
        values = np.array([record["best"]["test"][metric] for record in self.records])
        return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0

    @cached_property
    def curves(self) -> Curves:
        """Of the runs whose metrics.csv has all epochs."""
        both = zip(self.runs, self.records, strict=True)
        found = [read_curves(run.metrics_file, record) for run, record in both if run.metrics_file.exists()]
        most = max((len(columns["epoch"]) for columns in found), default=0)
        return Curves.of([columns for columns in found if len(columns["epoch"]) == most])

    @property
    def best_run(self) -> RunFolder:
        """The one with the best validation score."""
        scores = [(record["best"]["validation"][self.score], number) for number, record in enumerate(self.records)]
        return self.runs[metrics.BETTER[self.records[0]["task"]](scores)[1]]

    def best(self) -> Path:
        """The checkpoint of the best run, its own or the published one.

        Raises:
            ConfigError: it is not here; another run's would not show what the row can do.
        """
        run = self.best_run
        published = [weights_file(self.folder, run.run.name)] if self.folder else []
        found = next((file for file in (run.best, *published) if file.exists()), None)
        if not found:
            raise ConfigError(f"{run.path}: the record is here, the checkpoint is not")
        return found


def complete(planned: Sequence[PlannedRun], folder: Path | None = None) -> list[Row]:
    """The rows that have complete runs, in the plan's order.

    Args:
        folder: of published results, if there are.
    """
    rows = []
    for number, (row, group) in enumerate(groupby(planned, lambda one: one.row), start=1):
        runs = [one.folder for one in group if one.folder.complete]
        if runs:
            rows.append(Row(number, row, runs, [run.record() for run in runs], folder))
    return rows


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


def place(rows: Sequence[Row]) -> str:
    """On what data they are."""
    return ", ".join(dict.fromkeys(row.run.data["name"] for row in rows))


def spread_over(rows: Sequence[Row], what: str) -> str:
    """What the ink around a mean is."""
    least, most = min(len(row.runs) for row in rows), max(len(row.runs) for row in rows)
    return f"{what} over {least if least == most else f'{least} to {most}'} run{'s' if most > 1 else ''} of each row"


@matplotlib.rc_context(STYLE)
def tradeoff(rows: Sequence[Row]) -> Figure:
    """Test score against state updates, mean ± standard deviation over the runs; hollow: what is published.

    Raises:
        ConfigError: there are not two rows.
    """
    if len(rows) < 2:
        raise ConfigError("only one row has complete runs")
    found = panels(rows)
    figure = Figure((WIDTH, 1 + 1.6 * len(found)))
    one_axis = len({row.records[0]["steps"] for row in rows}) == 1
    # LSTM and GRU on one scale
    column = figure.subplots(len(found), sharex=one_axis, sharey=len({row.score for row in rows}) == 1, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (title, members) in zip(column[:, 0], found.items(), strict=True):
        steps, score = members[0].records[0]["steps"], members[0].score
        axes.set_yscale("log" if score == "mse" else "linear")
        for policy in dict.fromkeys(row.run.model.policy for row in members):
            handles |= _tradeoff_curve(axes, policy, [row for row in members if row.run.model.policy == policy])
        axes.margins(y=0.12)
        axes.set(
            title=f"{title}, {place(members)}",
            xlabel=f"state updates, of {steps} steps",
            ylabel=f"test {SCORES[score]}",
            xlim=(0, 1.04 * steps),
        )
        if one_axis:
            axes.label_outer()
    low, high = column[0, 0].get_ylim()
    if column[0, 0].get_yscale() == "log" and high < 1.1 * low:  # matplotlib leaves a lone point no room at all
        column[0, 0].set_ylim(low / 2, high * 2)
    title = spread_over(rows, "mean ± standard deviation")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, title=title)
    return figure


def _tradeoff_curve(axes: Axes, policy: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One policy's points, those of a larger λ darker, published ones hollow; returns handles for the legend.

    A point of random skipping needs no label: p_skip is what its place says.
    """
    kind = POLICIES[policy]
    points = sorted(zip(rows, style.shades([row.run.model for row in rows]), strict=True), key=_budget_of)
    axes.plot(
        *zip(*((row.test("state_updates")[0], row.test(row.score)[0]) for row, _ in points), strict=True),
        color=style.colour(policy), linewidth=0.6, alpha=0.6, zorder=1,
    )  # fmt: skip
    shown = np.linspace(0, len(points) - 1, min(SHADES, len(points))).round()
    handles = {}
    for index, (row, shade) in enumerate(points):
        (x, across), (y, up) = row.test("state_updates"), row.test(row.score)
        look: dict[str, Any] = {
            "color": style.colour(policy) if kind.draws else shade,
            "marker": "o",
            "markersize": 3.5,
        }
        look |= {"linestyle": "none", "elinewidth": 0.7, "zorder": 2}
        handle = axes.errorbar(x, y, up, across, **look)
        label = f"random {kind.family}s" if kind.draws else kind.label.format("RNN")
        if kind.learned:
            label += f", {style.budget(row.run.model)}"
        if not kind.learned or index in shown:
            handles[label] = handle
        published = [row.planned.paper(metric) for metric in ("state_updates", row.score)]
        if all(mean is not None for mean, _ in published):
            (x, across), (y, up) = ((mean, std or 0.0) for mean, std in published)
            hollow = look | {"markerfacecolor": "white", "markersize": 4.5, "marker": "D"}
            handles["hollow: published"] = axes.errorbar(x, y, up, across, **hollow)
    return dict(sorted(handles.items(), key=lambda one: one[0].startswith("hollow")))


def _budget_of(point: tuple[Row, str]) -> tuple[float, float]:
    model = point[0].run.model
    return model.p_skip or 0.0, model.cost_per_sample


def _label(row: Row) -> str:
    """Of a row's curve, with how many of its runs have one, if not all."""
    shown = len(row.curves["validation/state_updates"])
    return style.described(row.run.model) + (f", {shown} of {len(row.runs)} runs" if shown < len(row.runs) else "")


def _with_curves(rows: Sequence[Row]) -> list[Row]:
    """Raises ConfigError: none has its metrics.csv, or of one epoch only."""
    rows = [row for row in rows if len(row.curves.epochs) > 1]
    if not rows:
        raise ConfigError("a curve needs metrics.csv of two epochs")
    return rows


def _draw_curves(axes: Axes, rows: Sequence[Row], metric: str, x: Callable[[Row], np.ndarray]) -> None:
    """Mean and range of each row; the first lines are the widest, so that none is hidden under another."""
    shades = style.shades([row.run.model for row in rows])
    widths = np.linspace(1.8, 0.8, len(rows))
    for row, shade, width in zip(rows, shades, widths, strict=True):
        mean, low, high = spread(row.curves[f"validation/{metric}"])
        axes.fill_between(x(row), low, high, color=shade, alpha=0.2, linewidth=0)
        axes.plot(x(row), mean, color=shade, linewidth=width, label=_label(row))


@matplotlib.rc_context(STYLE)
def curves(title: str, rows: Sequence[Row], alike: Sequence[Row]) -> Figure:
    """Validation score and state updates by epoch: mean, and the range over the seeds.

    The legend says so where only some of a row's complete runs have their metrics.csv.

    Args:
        title: of the panel.
        rows: its rows.
        alike: with which it shares its scale: LSTM and GRU are to be compared.

    Raises:
        ConfigError: no run has its metrics.csv, or of one epoch only.
    """
    rows = _with_curves(rows)
    figure = Figure((WIDTH, 3.4 + 0.09 * len(rows)))
    upper, lower = figure.subplots(2, sharex=True)
    score = rows[0].score
    for axes, metric in ((upper, score), (lower, "state_updates")):
        _draw_curves(axes, rows, metric, lambda row: row.curves.epochs)
        axes.set_yscale("log" if metric == "mse" else "linear")
        same = [row.curves[f"validation/{metric}"] for row in _with_curves(alike) if row.score == score]
        axes.set_ylim(*limits([value[np.isfinite(value)] for value in same], axes.get_yscale()))
    upper.set(title=f"{title}, {place(rows)}", ylabel=f"validation {SCORES[score]}")
    lower.set(xlabel="epoch", ylabel="state updates", ylim=(0, None))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    what = spread_over(rows, "line: mean, band: range")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2, title=what)
    return figure


def limits(values: Sequence[np.ndarray], scale: str) -> tuple[float, float]:
    """Of an axis that shows all of these."""
    low, high = min(value.min() for value in values), max(value.max() for value in values)
    if scale == "log":
        return (low / 1.2 or high / 10), high * 1.2
    return low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)


@matplotlib.rc_context(STYLE)
def learning(rows: Sequence[Row]) -> Figure:
    """Validation score against training steps and against seconds of training: mean, and the range over the seeds.

    Without seconds, unless each run has its own.

    Raises:
        ConfigError: no run has its metrics.csv, or of one epoch only.
    """
    found = panels(_with_curves(rows))
    rows = [row for members in found.values() for row in members]
    scales: dict[str, Callable[[Row], np.ndarray]] = {
        "training step": lambda row: row.curves.epochs * steps_per_epoch(row.records[0])
    }
    if used := clock([row.curves for row in rows]):
        scales[SECONDS[used]] = lambda row: row.curves.seconds(used)
    figure = Figure((WIDE if len(scales) > 1 else WIDTH, 0.6 + 1.8 * len(found) + 0.06 * len(rows)))
    shared = len({row.score for row in rows}) == 1
    grid = figure.subplots(len(found), len(scales), sharey=shared, sharex="col", squeeze=False)
    handles: dict[str, Any] = {}
    for line, (title, members) in zip(grid, found.items(), strict=True):
        score = members[0].score
        for axes, (xlabel, x) in zip(line, scales.items(), strict=True):
            _draw_curves(axes, members, score, x)
            axes.set(title=f"{title}, {place(members)}", yscale="log" if score == "mse" else "linear")
            axes.set(xlabel=xlabel, ylabel=f"validation {SCORES[score]}")
            axes.label_outer()
        handles |= dict(zip(*line[0].get_legend_handles_labels()[::-1], strict=True))
    what = spread_over(rows, "line: mean, band: range")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * len(scales), title=what)
    return figure


def pictures(rows: Sequence[Row], every: bool = True) -> Iterator[tuple[str, Callable[[], Figure | str]]]:
    """Name and drawing of each figure, or of an HTML page, that the rows ask for.

    Args:
        every: also those that take long, curves by epoch and what best runs read.

    The drawings raise ConfigError or DataError where something is missing.
    """
    yield "tradeoff", partial(tradeoff, rows)
    yield "learning", partial(learning, rows)
    if not every:
        return
    for title, members in panels(rows).items():
        yield f"curves-{re.sub(r'[^a-z0-9.]+', '-', title.lower())}", partial(curves, title, members, rows)
    for row in rows:
        name = f"{row.number}-{row.run.row}"
        draw = usage.of_policy(POLICIES[row.run.model.policy])
        if draw:
            yield f"{draw.__name__}-{name}", partial(of_best, row, draw)
        if draw is usage.usage and row.run.data["name"] == "imdb":
            yield f"usage-{name}", partial(of_best, row, usage.words_page)


def of_best(row: Row, draw: Callable[[SequenceModule], Figure | str]) -> Figure | str:
    """A picture of the row's best run, from its checkpoint, which must be its own."""
    run, file = row.run, row.best()
    if file == row.best_run.best:
        row.best_run.checkpoint(file)
    return draw(load(file, data_root=run.data_root, device=run.device, threads=run.threads))


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


def publish(
    experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None, every: bool = True
) -> str:
    """Draw what the complete runs allow; returns what was written, and what was left out and why.

    Args:
        experiment, planned: as from skiprnn.papers.plan.apart.
        folder: of the experiment's table, below which the figures go; None: where skiprnn.tables puts it.
        every: as of `pictures`.

    Raises:
        ConfigError: no run is complete.
    """
    rows = complete(planned, folder)
    if not rows:
        raise ConfigError(f"output={planned[0].run.output}: none of the {len(planned)} runs is complete")
    target = (folder or experiment.folder(planned[0].run)) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    done = sum(len(row.runs) for row in rows)
    lines = [f"{done} of {len(planned)} runs are complete; figures in {target}/"]
    for name, draw in track(list(pictures(rows, every)), "drawing", transient=True, console=Console(stderr=True)):
        try:
            lines += [f"  {file.name}" for file in write(draw(), target / name)]
        except (ConfigError, DataError) as error:
            lines.append(f"  left out: {name}: {str(error).splitlines()[0]}")
    return "\n".join(lines)

"""Pictures of what a trained network reads: test sequences with the used samples red and the skipped ones blue.

Every function takes a module (skiprnn.training.setup.load gives one) and returns a matplotlib figure, a paper's column
wide.
Shapes: T steps, I input, H neurons of all layers, C outputs.
"""

import html
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from skiprnn.data.adding import Adding
from skiprnn.data.base import MIRROR, SequenceData, Split, StoredData
from skiprnn.data.frequency import FrequencyDiscrimination
from skiprnn.data.imdb import CLASSES, PADDING, IMDb
from skiprnn.data.ucf101 import UCF101
from skiprnn.data.ucf101.extract import sample_frames
from skiprnn.data.ucf101.store import FPS
from skiprnn.model.policies import POLICIES, Policy
from skiprnn.training.config import ConfigError
from skiprnn.training.measures import state_updates
from skiprnn.training.module import SequenceModule
from skiprnn.views.style import SKIPPED, STYLE, USED, WIDTH, described

PADDING_SHADE = 0.4  # of red and blue over padded frames


@dataclass(frozen=True)
class Example:
    """A test sequence, and what the network did with it."""

    row: int  # in the test set
    inputs: np.ndarray  # (T, I), or (T,) token ids
    target: float
    prediction: float  # a class, or a number
    updates: np.ndarray  # (T,) or (T, H) bool
    length: int  # valid steps

    @property
    def counted(self) -> float:
        """State updates."""
        return float(state_updates(torch.from_numpy(self.updates[None]).float()))


@torch.no_grad()
def examples(module: SequenceModule, count: int, preferred: Callable[[int], bool] = lambda row: False) -> list[Example]:
    """Test sequences: the preferred rows first, then class by class in turn, as the test set has them."""
    data = module.data
    part = data.splits["test"] if isinstance(data, StoredData) else Split(*next(iter(data.evaluation_batches("test"))))
    seen: Counter = Counter()
    order = []
    for row, target in enumerate(part.targets.tolist()):
        kind = target if data.task == "classification" else 0
        order.append((not preferred(row), seen[kind], kind, row))
        seen[kind] += 1
    rows = [row for *_, row in sorted(order)[:count]]
    inputs, targets, lengths = part.take(torch.tensor(rows, device=module.device))
    prediction, updates = module.network(inputs, lengths)
    answers = prediction.argmax(1) if data.task == "classification" else prediction.squeeze(1)
    valid = [data.steps] * len(rows) if lengths is None else lengths.tolist()
    columns = [part.cpu().numpy() for part in (inputs, targets, answers, updates > 0)]
    return [Example(*values) for values in zip(rows, *columns, valid, strict=True)]


def of_policy(policy: type[Policy]) -> Callable[[SequenceModule], Figure] | None:
    """The picture of what such a policy has learned; None if it does not learn."""
    if not policy.learned:
        return None
    return usage if policy.family == "step" else neurons


def picture(module: SequenceModule) -> Figure:
    """What a network uses of a few test sequences: a Skip RNN samples, an SA-RNN neurons.

    Raises:
        ConfigError: nobody has said how to draw data of this kind, or the policy learns nothing.
    """
    policy = POLICIES[module.run.model.policy]
    draw = of_policy(policy)
    if draw is None:
        raise ConfigError(f"policy {policy.name} learns nothing that could be seen")
    return draw(module)


# --- step policies: a picture for each kind of data ---


@matplotlib.rc_context(STYLE)
def usage(module: SequenceModule) -> Figure:
    """What a Skip RNN reads of a few test sequences.

    Raises:
        ConfigError: nobody has said how to draw data of this kind.
    """
    data = module.data
    if isinstance(data, IMDb):
        return words(module)
    if isinstance(data, UCF101):
        return frames(module)
    if data.image:
        return images(module)
    if data.input_size <= 2:
        return samples(module)
    raise ConfigError(f"there is no picture of {type(data).__name__} yet: write one in skiprnn/views/samples.py")


def _named(module: SequenceModule) -> str:
    """The model with its λ, and its data."""
    return f"{described(module.run.model)}, {module.run.data['name']}"


def _legend(figure: Figure, module: SequenceModule, *more: Line2D) -> None:
    """What red and blue mean, and whose they are."""
    handles = [_square(USED, "used"), _square(SKIPPED, "skipped"), *more]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.2, title=_named(module))


def _square(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle="none", marker="s", markersize=4)


def _outcome(example: Example, names: Sequence[str]) -> str:
    """The class's name, and of the one that it was taken for if that is another."""
    truth, answer = names[int(example.target)], names[int(example.prediction)]
    return truth if truth == answer else f"{truth}, taken for {answer}"


def images(module: SequenceModule) -> Figure:
    """An image of every class: ink light, used pixels red, skipped ones blue ([SKIP] figure 3)."""
    shown, names = examples(module, 10), [str(number) for number in range(module.data.outputs)]
    figure = Figure((WIDTH, 2.0))
    for axes, example in zip(figure.subplots(2, 5).flat, shown, strict=True):
        ink = 0.75 * example.inputs[..., None] / max(example.inputs.max(), 1e-9)  # not white: its colour shows
        colours = np.where(example.updates[:, None, None], _rgb(USED), _rgb(SKIPPED))  # (T, 1, 3)
        image = module.data.picture(colours * (1 - ink) + ink)
        axes.imshow(image, interpolation="nearest", aspect=image.shape[1] / image.shape[0])
        axes.set_title(f"{_outcome(example, names)}\n{100 * example.updates.mean():.0f} % used", fontsize=5.5, pad=2)
        axes.set_axis_off()
    _legend(figure, module)
    return figure


def samples(module: SequenceModule) -> Figure:
    """Sequences of numbers, with the marked ones of the adding task ([SKIP] figures 5 and 6)."""
    data = module.data
    shown = examples(module, 3 if data.task == "regression" else 4)
    figure = Figure((WIDTH, 0.5 + 0.8 * len(shown)))
    panels = figure.subplots(len(shown), sharex=True, sharey=True)
    for axes, example in zip(panels, shown, strict=True):
        _samples(axes, data, example)
    panels[-1].set_xlabel("step")
    marks = [Line2D([], [], color="black", marker="v", linestyle="none", markersize=3, label="to be added")]
    _legend(figure, module, *(marks if isinstance(data, Adding) else []))
    return figure


def _samples(axes: Axes, data: SequenceData, example: Example) -> None:
    steps, values, used = np.arange(1, data.steps + 1), example.inputs[:, 0], example.updates
    size = min(3.0, 150 / data.steps)
    axes.plot(steps, values, color="#bbbbbb", linewidth=0.4, zorder=1)
    axes.plot(steps[~used], values[~used], "o", color=SKIPPED, markersize=size * 0.75)
    axes.plot(steps[used], values[used], "o", color=USED, markersize=size)
    axes.margins(x=0.01, y=0.25)
    if isinstance(data, Adding):
        marked = example.inputs[:, 1] > 0
        axes.plot(steps[marked], values[marked] + 0.16 * (data.high - data.low), "v", color="black", markersize=3)
        title = f"sum {example.target:.3f}, predicted {example.prediction:.3f}"
    elif isinstance(data, FrequencyDiscrimination):
        low, high = data.target
        inside = f"in {low:g}–{high:g} ms"
        title = f"period {_outcome(example, (inside, f'not {inside}'))}"
    else:
        title = f"{example.target:g}, predicted {example.prediction:g}"
    axes.set_title(f"{title}; {example.counted:.0f} of {data.steps} used", loc="left", pad=3)


def words(module: SequenceModule) -> Figure:
    """The first 200 words of a review of each class: read words red and bold, skipped ones blue."""
    shown, vocabulary = _reviews(module, 2)
    lines = [_broken(list(zip(vocabulary[ids], used, strict=True))[:200]) for ids, used in map(_tokens, shown)]
    leading = 0.125  # inches from line to line
    figure = Figure((WIDTH, 0.45 + sum(leading * (len(each) + 2) for each in lines)))
    figure.set_layout_engine("none")
    top = figure.get_figheight() - 0.02
    for example, each in zip(shown, lines, strict=True):
        top -= leading
        _write(figure, 0.05, top, _review_title(example), color="black", weight="bold")
        for line in each:
            top -= leading
            for left, word, used in line:
                weight = "bold" if used else "normal"
                _write(figure, 0.05 + left, top, word, color=USED if used else SKIPPED, weight=weight)
        top -= leading
    _legend(figure, module)
    return figure


def _write(figure: Figure, left: float, bottom: float, text: str, **style) -> None:
    """Text at a place in inches."""
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, fontsize=6, **style)


def _broken(tokens: Sequence[tuple[str, bool]]) -> list[list[tuple[float, str, bool]]]:
    """Words as lines that fit the width: (inches from the left, word, used) each."""
    lines: list[list[tuple[float, str, bool]]] = [[]]
    left = 0.0

    def extent(text: str, font: FontProperties) -> float:
        return TextPath((0, 0), text, prop=font).get_extents().width / 72

    for word, used in tokens:
        font = FontProperties(weight="bold" if used else "normal", size=6)
        word = word.replace("$", r"\$")
        # with the space after it, which without the bar would have no extent
        width = extent(f"|{word} |", font) - extent("||", font)
        if left + width > WIDTH - 0.1:
            lines.append([])
            left = 0.0
        lines[-1].append((left, word, used))
        left += width
    return lines


def _reviews(module: SequenceModule, count: int) -> tuple[list[Example], np.ndarray]:
    assert isinstance(module.data, IMDb)
    return examples(module, count), np.array(module.data.words(), dtype=object)


def _tokens(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Ids and updates of a review's words, without padding."""
    real = example.inputs != PADDING
    return example.inputs[real], example.updates[real]


def _review_title(example: Example) -> str:
    ids, used = _tokens(example)
    padding = int(example.updates.sum() - used.sum())
    return f"{_outcome(example, CLASSES)}; {used.sum()} of {len(ids)} words read" + (
        f", and {padding} steps of padding" if padding else ""
    )


def words_page(module: SequenceModule, count: int = 10) -> str:
    """The words read in test reviews as an HTML page of its own."""
    shown, vocabulary = _reviews(module, count)
    parts = []
    for example in shown:
        ids, used = _tokens(example)
        marked = (
            f"<{tag}>{html.escape(word)}</{tag}>"
            for word, tag in zip(vocabulary[ids], np.where(used, "b", "span"), strict=True)
        )
        parts.append(f"<h2>Review {example.row}: {_review_title(example)}</h2>\n<p>{' '.join(marked)}</p>")
    return PAGE.format(
        title=f"Words read by {module.run.model.name}", used=USED, skipped=SKIPPED, body="\n".join(parts)
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.6 sans-serif; max-width: 44em; margin: 2em auto; padding: 0 1em; background: white; color: black }}
h2 {{ font-size: 1em; margin: 2em 0 0 }}
b {{ color: {used} }} span {{ color: {skipped}; opacity: .8 }}
</style></head><body>
<h1>{title}</h1>
<p><b>read</b> <span>skipped</span></p>
{body}
</body></html>
"""


def frames(module: SequenceModule) -> Figure:
    """Which frames of clips are used, as a timeline; above it some of the frames where the video is at hand.

    Videos are looked for in ucf101/videos/CLASS/ below the data folder and below SKIPRNN_MIRROR.
    """
    data = module.data
    assert isinstance(data, UCF101)
    clips = data.clips["test"]
    films = {row: _video(data, f"{clip.action}/{clip.name}.avi") for row, clip in enumerate(clips)}
    shown = examples(module, 5, lambda row: films[row] is not None)
    stills = any(films[example.row] for example in shown)
    figure = Figure((WIDTH, 0.4 + (len(shown) + 0.4) * (0.75 if stills else 0.4)))
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.015, wspace=0, hspace=0)
    heights = [1.0] * (len(shown) - 1) + [1.4]  # the last has the axis
    bands = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for band, example in zip(bands, shown, strict=True):
        clip, film = clips[example.row], films[example.row]
        length = min(clip.frames, data.steps)
        chosen = _stills(example.updates[:length], 8) if film else []
        grid = band.add_gridspec(2 if film else 1, 8, height_ratios=[3, 1] if film else [1], wspace=0.05, hspace=0.05)
        pictures = sample_frames(film) if film else []
        for column, frame in enumerate(chosen):
            axes = band.add_subplot(grid[0, column], xticks=[], yticks=[])
            axes.imshow(np.asarray(pictures[frame]), aspect="auto")
            axes.spines[:].set(visible=True, color=USED if example.updates[frame] else SKIPPED, linewidth=1.5)
        axes = band.add_subplot(grid[-1, :], yticks=[])
        colours = np.where(example.updates[:, None], _rgb(USED), _rgb(SKIPPED))
        colours[length:] = 1 - (1 - colours[length:]) * PADDING_SHADE
        axes.imshow(colours[None], aspect="auto", interpolation="nearest", extent=(0, data.steps / FPS, 0, 1))
        for frame in chosen:
            axes.axvline((frame + 0.5) / FPS, ymin=1, ymax=1.4, color="black", linewidth=0.5, clip_on=False)
        axes.tick_params(labelbottom=example is shown[-1])
        text = f"{_outcome(example, data.classes)}; {example.updates[:length].sum()} of {length} frames used"
        band.suptitle(text, fontsize=6, x=0.01, ha="left")
    first, *_, last = axes.get_xticklabels()
    first.set_ha("left")
    last.set_ha("right")  # or they would stick out, and this axis be narrower than those above
    axes.set_xlabel("seconds")
    _legend(figure, module, _square(to_hex(tuple(1 - (1 - _rgb(SKIPPED)) * PADDING_SHADE)), "padding (pale)"))
    return figure


def _stills(updates: np.ndarray, count: int) -> list[int]:
    """Some of a clip's frames, in order: used ones, evenly spread, and where they are few, skipped ones as well."""
    chosen: list[int] = []
    for frames in (np.flatnonzero(updates), np.flatnonzero(~updates)):
        spread = np.linspace(0, len(frames) - 1, min(count - len(chosen), len(frames))).round().astype(int)
        chosen += frames[spread].tolist()
    return sorted(chosen)


def _video(data: UCF101, name: str) -> Path | None:
    """A clip's video, if it is at hand."""
    folders = [data.root / "ucf101" / "videos", Path(os.environ.get(MIRROR, "")) / "ucf101" / "videos"]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _rgb(colour: str) -> np.ndarray:
    return np.array(to_rgb(colour))


# --- neuron policies ---


@matplotlib.rc_context(STYLE)
def neurons(module: SequenceModule) -> Figure:
    """Which neurons an SA-RNN updates at every step of one test sequence, the busiest on top, above their share."""
    (example,) = examples(module, 1)
    data, sizes = module.data, [cell.hidden_size for cell in module.network.rnn.cells]
    numeric = example.inputs.ndim == 2 and data.input_size <= 2
    figure = Figure((WIDTH, 2.2 + 0.5 * numeric))
    ratios = [1] * numeric + [4, 1]
    *above, raster, share = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
    extent = (0.5, data.steps + 0.5)
    order, bounds = [], np.cumsum([0, *sizes])
    for first, last in itertools.pairwise(bounds):
        order += list(first + np.argsort(-example.updates[:, first:last].sum(0), kind="stable"))
    raster.imshow(
        example.updates[:, order].T,
        cmap=ListedColormap(["#e8eef5", USED]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(*extent, sum(sizes) + 0.5, 0.5),
    )
    for bound in bounds[1:-1]:
        raster.axhline(bound + 0.5, color="black", linewidth=0.6)
    raster.set_ylabel("neuron, of each layer" if len(sizes) > 1 else "neuron")
    share.stairs(
        100 * example.updates.mean(1), np.arange(data.steps + 1) + 0.5, color=USED, linewidth=0.8, baseline=None
    )
    share.set(xlabel="step", ylabel="updated, %", ylim=(0, 105), xlim=extent)
    for axes in above:
        axes.plot(np.arange(1, data.steps + 1), example.inputs[:, 0], color="black", linewidth=0.6)
        if isinstance(data, Adding):
            marked = example.inputs[:, 1] > 0
            axes.plot(np.flatnonzero(marked) + 1, example.inputs[marked, 0], "v", color=USED, markersize=4)
        axes.set_ylabel("input")
    figure.align_ylabels()
    counted = f"{example.counted:.1f} updates in {example.length} steps, mean over the neurons"
    figure.suptitle(f"{_named(module)}: {counted}", fontsize=6)
    return figure

"""Pictures that show what was computed: means and ranges from known records, colours from the update gates."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, compose, make_small_imdb, make_small_ucf101, trained
from matplotlib.colors import to_rgb
from test_data_ucf101 import film

from skiprnn import bench
from skiprnn import figures as command
from skiprnn.data.base import MIRROR
from skiprnn.papers import plan
from skiprnn.training import command_line
from skiprnn.training.config import ConfigError
from skiprnn.training.module import SequenceModule
from skiprnn.training.setup import make_module
from skiprnn.views import figures, style
from skiprnn.views import samples as usage

RED, BLUE = np.array(to_rgb(usage.USED)), np.array(to_rgb(usage.SKIPPED))


def planned(output: Path, *arguments: str) -> list[plan.PlannedRun]:
    return plan.requested([*arguments, f"output={output}"])[1]


def finish(one: plan.PlannedRun, steps: int = 64, **test: float) -> None:
    """The record of a complete run, as far as figures read it."""
    one.folder.path.mkdir(parents=True, exist_ok=True)
    best = {"test": test | {"inference_flops": 1.0}, "validation": test}
    more = {"solved_at": None, "input_flops": 0.0, "examples": {"train": 640}}
    one.folder.finish({"best": best, "final": best, "steps": steps} | more)


# curves of numbers


@pytest.fixture
def sweep(tmp_path):
    """Two seeds of each row of a λ sweep, whose accuracy and updates follow from λ, p_skip and seed."""
    runs = planned(tmp_path, "experiment=sweep_digits", "profile=digits/sweep", "seed=0,1")
    for one in runs:
        model, sign = one.run.model, 1 - 2 * one.run.seed
        used = 64 * (1 - (model.p_skip or 0)) - 3000 * model.cost_per_sample
        finish(one, accuracy=0.5 + used / 200 + 0.01 * sign, state_updates=used + sign)
        epochs = pd.DataFrame({"epoch": [0, 1]})
        epochs["validation/accuracy"] = [0.3 + 0.1 * one.run.seed, 0.6]
        epochs["validation/state_updates"] = [64.0, used]
        epochs["seconds"] = [2.0, 1.0 + one.run.seed]
        epochs.to_csv(one.folder.path / "metrics.csv", index=False)
    return runs


def test_tradeoff_has_a_point_per_row_with_its_mean_and_deviation(sweep):
    figure = figures.tradeoff(figures.complete(sweep))
    assert [axes.get_title() for axes in figure.axes] == ["LSTM, digits", "GRU, digits"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes in figure.axes:
        for container, expected in zip(axes.containers[-4:], [64, 61, 55, 34], strict=True):  # λ = 0, 1e-3, 3e-3, 1e-2
            line, _, (across, up) = container
            np.testing.assert_allclose(line.get_xydata(), [[expected, 0.5 + expected / 200]])
            for bars, deviation in ((across, np.sqrt(2)), (up, 0.01 * np.sqrt(2))):  # of +1 and -1
                lengths = [np.abs(np.subtract(*segment)).max() for segment in bars.get_segments()]
                np.testing.assert_allclose(lengths, 2 * deviation)
        colours = [container[0].get_color() for container in axes.containers]
        assert colours[:4] == [style.BASELINE, *[style.RANDOM] * 3]
        assert colours[-1] == style.colour("skip")
        brightness = [sum(to_rgb(one)) for one in colours[-4:]]
        assert brightness == sorted(brightness, reverse=True), "the larger λ, the darker"
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "mean ± standard deviation over 2 runs of each row"
    assert [text.get_text() for text in legend.get_texts()] == [
        *("RNN", "random steps"),
        *(f"Skip RNN, λ = {cost}" for cost in ("0", "1e-3", "3e-3", "1e-2")),
    ]


def test_a_long_legend_is_thinned(tmp_path):
    runs = planned(tmp_path, "model=skip_lstm", f"model.cost_per_sample={','.join(f'{n}e-4' for n in range(20))}")
    for one in runs:
        finish(one, accuracy=0.9, state_updates=60 - 1e3 * one.run.model.cost_per_sample)
    (legend,) = figures.tradeoff(figures.complete(runs)).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == figures.SHADES
    assert (labels[0], labels[-1]) == ("Skip RNN, λ = 0", "Skip RNN, λ = 1.9e-3")


def test_tradeoff_shows_what_is_published(tmp_path):
    runs = planned(tmp_path, "experiment=table1", "profile=mnist/smoke", "rows=[1,3,6]", "seed=0")
    for one in runs:
        finish(one, steps=784, accuracy=0.9, state_updates=400)
    figure = figures.tradeoff(figures.complete(runs))
    hollow = [one for axes in figure.axes for one in axes.containers if one[0].get_markerfacecolor() == "white"]
    published = [[784.0, 0.910], [379.38, 0.973], [392.62, 0.976]]
    np.testing.assert_allclose([one[0].get_xydata()[0] for one in hollow], published)
    skip = hollow[1][2][1].get_segments()[0]
    np.testing.assert_allclose(skip[:, 1], [0.973 - 0.002, 0.973 + 0.002])
    assert "hollow: published" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_same_figure_is_the_same_file(sweep, tmp_path):
    rows = figures.complete(sweep)
    names = ("one", "other")
    one, other = ([file.read_bytes() for file in figures.write(figures.tradeoff(rows), tmp_path / n)] for n in names)
    assert one == other
    assert b"CreationDate" not in one[0]


def test_tradeoff_needs_two_rows(tmp_path):
    runs = planned(tmp_path, "experiment=table1", "profile=mnist/smoke", "seed=0", "rows=[1]")
    for one in runs:
        finish(one, accuracy=0.9, state_updates=60)
    with pytest.raises(ConfigError, match="only one row"):
        figures.tradeoff(figures.complete(runs))


def test_errors_are_drawn_on_a_logarithmic_scale(tmp_path):
    runs = planned(tmp_path, "experiment=sweep_adding", "profile=adding/long", "seed=0")
    for number, one in enumerate(runs, start=1):
        finish(one, steps=50, mse=0.01 * number, state_updates=40)
    assert {axes.get_yscale() for axes in figures.tradeoff(figures.complete(runs)).axes} == {"log"}


def test_a_lone_run_is_within_its_axis(tmp_path):
    runs = planned(tmp_path, "experiment=adding", "profile=adding/smoke", "rows=[4,5,6]")
    for one in runs:
        finish(one, steps=50, mse=5e-4, state_updates=50.0 - 1e6 * (one.run.model.cost_per_sample or 0))
    axes = figures.tradeoff(figures.complete(runs)).axes[1]
    low, high = axes.get_ylim()
    assert axes.get_title() == "GRU, adding"
    assert low < 4e-4
    assert high > 6e-4


def test_curves_show_mean_and_range_over_the_seeds(sweep):
    rows = figures.panels(figures.complete(sweep))["LSTM"]
    accuracy, updates = lstm_curves(sweep).axes
    assert accuracy.get_title() == "LSTM, digits"
    assert [line.get_label() for line in accuracy.lines][:2] == ["LSTM", "LSTM, random, p = 0.25"]
    for line, shade in zip(accuracy.lines, accuracy.collections, strict=True):
        np.testing.assert_allclose(line.get_xydata(), [[1, 0.35], [2, 0.6]])
        first = shade.get_paths()[0].vertices
        assert {round(y, 9) for x, y in first if x == 1} == {0.3, 0.4}
    skip = next(line for line in updates.lines if line.get_label() == "Skip LSTM, λ = 1e-2")
    np.testing.assert_allclose(skip.get_ydata(), [64, 34])
    assert len({line.get_color() for line in accuracy.lines}) == len(rows)
    widths = [line.get_linewidth() for line in accuracy.lines]
    assert widths == sorted(widths, reverse=True), "what is drawn later hides nothing"


def lstm_curves(sweep):
    rows = figures.complete(sweep)
    return figures.curves("LSTM", figures.panels(rows)["LSTM"], rows)


def test_curves_of_lstm_and_gru_have_one_scale(sweep):
    worse = next(one for one in sweep if one.run.model.cell == "gru").folder.path / "metrics.csv"
    pd.read_csv(worse).replace(0.6, 0.05).to_csv(worse, index=False)
    one = next(one for one in sweep if one.run.model.cell == "gru")
    finish(one, accuracy=0.05, state_updates=64)
    rows = figures.complete(sweep)
    for figure in (figures.tradeoff(rows), figures.learning(rows)):
        assert len({axes.get_ylim() for axes in figure.axes}) == 1
        assert figure.axes[0].get_ylim()[0] < 0.3
    both = [figures.curves(cell, members, rows).axes[0].get_ylim() for cell, members in figures.panels(rows).items()]
    assert both[0] == both[1]
    assert both[0][0] < 0.05


def test_learning_is_shown_by_step_and_by_second(sweep):
    rows = figures.complete(sweep)
    by_step, by_second, *of_gru = figures.learning(rows).axes
    assert len(by_step.lines) == len(figures.panels(rows)["LSTM"])
    for steps, seconds in zip(by_step.lines, by_second.lines, strict=True):
        np.testing.assert_allclose(steps.get_xydata(), [[10, 0.35], [20, 0.6]])  # 640 in batches of 64
        np.testing.assert_allclose(seconds.get_xydata(), [[2, 0.35], [3.5, 0.6]])
    assert len({axes.get_ylim() for axes in (by_step, by_second, *of_gru)}) == 1
    assert by_second.get_xlabel() == "" or "passed" in by_second.get_xlabel()
    assert "passed" in of_gru[1].get_xlabel()


@pytest.mark.parametrize(("places", "panels"), [([{"pack": 1}], 2), ([{"pack": 1}, {"pack": 6}], 1), ([], 1)])
def test_learning_is_shown_by_second_where_every_run_has_its_own(sweep, places, panels):
    folder = sweep[-1].folder
    folder.finish(folder.record() | {"places": places})
    figure = figures.learning(figures.complete(sweep))
    assert len(figure.axes) == panels * 2
    assert figure.axes[-1].get_xlabel().startswith("seconds" if panels > 1 else "training step")


def test_a_curve_of_some_of_its_runs_says_so(sweep):
    (sweep[0].folder.path / "metrics.csv").unlink()  # known by its record alone
    line, other = lstm_curves(sweep).axes[0].lines[:2]
    assert (line.get_label(), other.get_label()) == ("LSTM, 1 of 2 runs", "LSTM, random, p = 0.25")
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.4], [2, 0.6]])


def test_one_epoch_makes_no_curve(sweep):
    rows = figures.complete(sweep)
    for one in sweep:
        file = one.folder.path / "metrics.csv"
        pd.read_csv(file)[:1].to_csv(file, index=False)
    with pytest.raises(ConfigError, match="two epochs"):
        figures.curves("LSTM", rows, rows)
    with pytest.raises(ConfigError, match="two epochs"):
        figures.learning(rows)


def test_rows_of_other_data_settings_are_in_panels_of_their_own(tmp_path):
    runs = planned(tmp_path, "experiment=frequency", "profile=frequency/smoke")
    for one in runs:
        finish(one, accuracy=0.9, state_updates=60)
    rows = figures.complete(runs)
    panels = figures.panels(rows)
    assert list(panels) == [f"{cell}, sampling_period = {p}" for p in (1.0, 0.5) for cell in ("LSTM", "GRU")]
    assert sum(map(len, panels.values())) == len(rows)


def test_only_complete_runs_count_and_the_best_on_validation_is_shown(tmp_path):
    runs = planned(tmp_path, "experiment=sweep_adding", "profile=adding/long", "rows=[6]", "seed=0,1,2,3")
    for one, error in zip(runs, (0.3, 0.1, 0.2), strict=False):
        finish(one, mse=error, state_updates=40)
        one.folder.best.touch()
    (row,) = figures.complete(runs)
    assert len(row.runs) == 3
    assert row.test("mse") == (pytest.approx(0.2), pytest.approx(0.1))
    assert row.best() == runs[1].folder.best
    runs[1].folder.best.unlink()  # the others', though here, would not show the row's best
    with pytest.raises(ConfigError, match=f"{runs[1].run.name}: .* the checkpoint is not"):
        row.best()
    published = tmp_path / "published" / "checkpoints" / runs[1].run.name / "model.safetensors"
    published.parent.mkdir(parents=True)
    published.touch()
    (row,) = figures.complete(runs, tmp_path / "published")
    assert row.best() == published


def test_every_picture_names_model_cost_and_data():
    skip, neurons = (lively(f"model={model}", "model.cost_per_sample=1e-3") for model in ("skip_lstm", "sa_gru"))
    (legend,) = usage.usage(skip).legends
    assert legend.get_title().get_text() == "Skip LSTM, λ = 1e-3, digits"
    assert usage.neurons(neurons).get_suptitle().startswith("SA-GRU, λ = 1e-3, digits: ")


def test_time_against_rate_is_drawn_beside_torchs(tmp_path):
    times = [
        {"shape": "mnist", "cell": "lstm", "task": task, "seconds": {"torch": seconds}}
        for task, seconds in (("train", 2.0), ("infer", 0.5))
    ]
    curve = {"train": {"1": 1.5, "2": 0.8}, "infer": {"1": 0.4, "2": 0.2}}
    axes = bench.draw({"default": {"times": times, "curve": curve}}).axes[0]
    drawn = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert drawn["nn.LSTM, train"] == 2000
    assert drawn["nn.LSTM, infer"] == 500
    assert drawn["Skip LSTM, train"] == 1500


# what a network reads


def lively(*overrides: str) -> SequenceModule:
    """An untrained network that uses some samples and skips others."""
    run = command_line.read(compose([*SMALL, *overrides]))
    module = make_module(run).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.network.rnn.policy.parameters():
            parameter.normal_(std=1.5)
        if run.model.policy == "skip":
            module.network.rnn.policy.bias.fill_(-0.5)
    return module


@torch.no_grad()
def gates(module, row: int) -> np.ndarray:
    """The update gates of one test sequence, on its own."""
    inputs, _, lengths = module.data.splits["test"].take(torch.tensor([row]))
    return module.network(inputs, lengths)[1][0].numpy() > 0


@pytest.mark.parametrize(("pixels", "hold"), [(1, 1), (2, 2)])
def test_used_pixels_are_red_and_skipped_ones_blue(pixels, hold):
    module = lively("model=skip_lstm", f"+data.pixels={pixels}", f"+data.hold={hold}")
    shown = usage.examples(module, 10)
    assert [example.target for example in shown] == list(range(10))
    figure = usage.usage(module)
    for example, axes in zip(shown, figure.axes, strict=True):
        used = gates(module, example.row)
        assert 0 < used.mean() < 1
        drawn = np.asarray(axes.images[0].get_array()).reshape(8, hold, 8 // pixels, pixels, 3)
        drawn = drawn.swapaxes(1, 2).reshape(64 // pixels * hold, pixels, 3)  # step by step
        blank = module.data.splits["test"].inputs[example.row].numpy() == 0
        gate = np.broadcast_to(used[:, None], blank.shape)
        np.testing.assert_allclose(drawn[blank], np.where(gate[..., None], RED, BLUE)[blank])
        assert np.array_equal(drawn[..., 0] > drawn[..., 2], gate), "the ink's colour tells as well"
        assert f"{100 * used.mean():.0f} % used" in axes.get_title()


@pytest.mark.parametrize("data", ["adding", "frequency"])
def test_used_samples_are_red_and_skipped_ones_blue(data):
    module = lively("model=skip_gru", f"data={data}", "training.batch_size=8")
    figure = usage.usage(module)
    shown = usage.examples(module, len(figure.axes))
    for example, axes in zip(shown, figure.axes, strict=True):
        dots = {line.get_color(): line.get_xdata() for line in axes.lines if line.get_marker() == "o"}
        assert np.array_equal(dots[usage.USED], np.flatnonzero(example.updates) + 1)
        assert np.array_equal(dots[usage.SKIPPED], np.flatnonzero(~example.updates) + 1)
        assert f"{example.updates.sum()} of {module.data.steps} used" in axes.get_title("left")
        if data == "adding":
            (marks,) = (line.get_xdata() for line in axes.lines if line.get_marker() == "v")
            assert np.array_equal(marks, np.flatnonzero(example.inputs[:, 1]) + 1)
            assert f"sum {example.target:.3f}" in axes.get_title("left")


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """Overrides for a few reviews of made-up words, with signs that HTML and matplotlib read otherwise."""
    monkeypatch.delenv(MIRROR, raising=False)
    words = [" ".join(f"word{(number + k) % 7}" for k in range(30)) for number in range(10)]
    make_small_imdb(tmp_path, lambda part, label, number: f"<i> $5 & $6 {words[number]}")
    return ["data=imdb", "data.length=60", "+data.reviews_per_class=10", f"data_root={tmp_path}"]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_read_words_are_marked(padding, reviews, tmp_path):
    module = lively("model=skip_gru", "model.embedding_size=8", f"data.padding={padding}", *reviews)
    page = usage.words_page(module, 4)
    shown = usage.examples(module, 4)
    assert [example.target for example in shown] == [0, 1, 0, 1]
    paragraphs = re.findall(r"<p>(<(?:b|span)>&lt;.*)</p>", page)
    vocabulary = module.data.words()
    figure = usage.usage(module)
    figures.write(figure, tmp_path / "words")  # draws: "$" must not be taken for mathematics
    for index, example in enumerate(shown):
        words = example.inputs != 0
        length, read = words.sum(), [vocabulary[token] for token in example.inputs[words & example.updates]]
        marked = re.findall(r"<b>(.*?)</b>", paragraphs[index])
        assert 0 < len(read) < length
        assert [word.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for word in marked] == read
        assert f"{len(read)} of {length} words read" in page
    red = [text.get_text().replace(r"\$", "$") for text in figure.texts if text.get_color() == usage.USED]
    assert sorted(red) == sorted(
        vocabulary[token]
        for example in shown[:2]
        for token, used in zip(example.inputs, example.updates, strict=True)
        if used and token
    )


def test_frames_used_are_on_the_timeline_and_shown_where_there_is_a_video(tmp_path, monkeypatch):
    make_small_ucf101(tmp_path)
    monkeypatch.delenv(MIRROR, raising=False)
    module = lively("model=skip_lstm", "data=ucf101", f"data_root={tmp_path}")
    figure = usage.usage(module)
    assert [len(band.axes) for band in figure.subfigs] == [1] * 5
    for example, band in zip(usage.examples(module, 5), figure.subfigs, strict=True):
        used, frames = gates(module, example.row), module.data.clips["test"][example.row].frames
        (strip,) = np.asarray(band.axes[-1].images[0].get_array())
        np.testing.assert_allclose(strip[:frames], np.where(used[:frames, None], RED, BLUE))
        assert (strip[frames:].min(1) > strip[:frames].min()).all()  # padding is paler
        assert f"{used[:frames].sum()} of {frames} frames used" in band.get_suptitle()
    clip = module.data.clips["test"][9]
    film(tmp_path / "ucf101" / "videos" / clip.action / f"{clip.name}.avi", [100] * clip.frames, 25)
    first = usage.usage(module).subfigs[0]
    assert len(first.axes) == 8 + 1
    used = gates(module, 9)[: clip.frames]
    stills = usage._stills(used, 8)
    borders = [axes.spines["left"].get_edgecolor()[:3] for axes in first.axes[:8]]
    np.testing.assert_allclose(borders, np.where(used[stills][:, None], RED, BLUE))


def test_stills_are_used_frames_before_skipped_ones():
    used = np.isin(np.arange(20), [0, 3, 17])
    assert set(usage._stills(used, 5)) == {0, 3, 17, 1, 19}
    assert usage._stills(~used, 5) == [1, 6, 10, 14, 19]  # every fourth of the 17
    assert usage._stills(used[:3], 5) == [0, 1, 2]


@pytest.mark.parametrize("data", ["digits", "adding"])
def test_neurons_are_shown_step_by_step(data):
    module = lively("model=sa_gru", "model.num_layers=2", f"data={data}", "training.batch_size=8")
    (example,) = usage.examples(module, 1)
    figure = usage.neurons(module)
    raster, share = figure.axes[-2:]
    shown = np.asarray(raster.images[0].get_array())
    assert shown.shape == (12, module.data.steps)
    assert 0 < shown.mean() < 1
    for layer in (slice(0, 6), slice(6, 12)):  # each layer's neurons together, the busiest on top
        busy = shown[layer].sum(1)
        assert list(busy) == sorted(busy, reverse=True)
        assert sorted(map(bytes, shown[layer])) == sorted(map(bytes, example.updates.T[layer].copy()))
    np.testing.assert_allclose(share.patches[0].get_data().values, 100 * shown.mean(0))


def test_data_without_a_picture_say_so():
    module = lively("model=skip_lstm")
    module.data = type("Odd", (), {"image": None, "input_size": 9})()
    with pytest.raises(ConfigError, match="no picture of Odd yet"):
        usage.usage(module)


# the command


def test_the_command_draws_what_it_can_and_says_what_it_left_out(tmp_path, capsys):
    arguments = ["experiment=digits", "profile=digits/smoke", *SMALL, "training.epochs=2", "rows=[1,4,12]"]
    arguments += ["+training.train_batches=1", "+training.evaluation_batches=1"]
    runs = planned(tmp_path, *arguments)
    for one in runs[1:]:
        trained(one.run)
    target = tmp_path / "published"
    command.main([*arguments, f"output={tmp_path}", f"publish={target}"])
    printed = capsys.readouterr().out
    assert "2 of 3 runs are complete" in printed
    written = sorted(file.name for file in (target / "figures").iterdir())
    names = [
        "curves-gru",
        "curves-lstm",
        "learning",
        "neurons-3-sa_gru_lambda0.01",
        "tradeoff",
        "usage-2-skip_lstm_lambda0.01",
    ]
    assert written == [f"{name}{suffix}" for name in names for suffix in (".pdf", ".png")]
    assert all(file.read_bytes().startswith((b"%PDF", b"\x89PNG")) for file in (target / "figures").iterdir())
    for one in runs[1:]:
        one.folder.best.unlink()
        (one.folder.path / "metrics.csv").unlink()
    capsys.readouterr()
    command.main([*arguments, f"output={tmp_path}", "hydra/launcher=processes"])
    assert capsys.readouterr().out.count("left out: ") == 5


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: output=.*: none of the 1 runs is complete"):
        command.main([f"output={tmp_path}"])
    with pytest.raises(SystemExit, match=r"error: output=.*: none of the 12 runs is complete"):
        command.main(["experiment=digits", "profile=digits/smoke", f"output={tmp_path}"])


def test_a_grid_has_figures_without_an_experiment(tmp_path, capsys):
    grid = ["model=skip_lstm,skip_gru", "model.cost_per_sample=0,1e-3", f"output={tmp_path}"]
    for one in planned(tmp_path, *grid):
        finish(one, accuracy=0.9, state_updates=60)
    command.main(grid)
    (drawn,) = tmp_path.glob("tables/digits-*_cpu/figures/tradeoff.png")
    assert f"figures in {drawn.parent}/" in capsys.readouterr().out

"""SkipLSTM on your own time series: forecast a column of a CSV file, and see which samples the network reads.

    python examples/own_time_series.py data.csv --target load --horizon 4
    python examples/own_time_series.py                    # without a file: two noisy waves are drawn and stored

Every row of the file is a step, every numeric column an input; commas, semicolons (with decimal commas as well) and
tabs separate. Rows are put in the order of a column of dates if there is one, gaps are filled with the value before;
what is left out or filled is said before training. The first 80 % of the rows are for training. From a window of rows
the network says what the target is `horizon` rows later; a cost λ per row read makes it read fewer.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from skiprnn import SkipLSTM


class Forecaster(nn.Module):
    """Window x (B, T, I) -> forecast (B,), and which steps were read (B, T)."""

    def __init__(self, inputs: int, hidden_size: int = 32):
        super().__init__()
        self.rnn = SkipLSTM(inputs, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, (h, _), updates = self.rnn(x)
        return self.readout(h[-1]).squeeze(1), updates


def made_up(path: Path, rows: int = 1500) -> None:
    """Two noisy waves and a column that follows them."""
    rng, time = np.random.default_rng(0), np.arange(rows)
    fast, slow = np.sin(2 * np.pi * time / 12), np.sin(2 * np.pi * time / 60)
    table = {"fast": fast + 0.1 * rng.standard_normal(rows), "slow": slow + 0.1 * rng.standard_normal(rows)}
    pd.DataFrame(table | {"load": slow + 0.5 * fast + 0.1 * rng.standard_normal(rows)}).to_csv(path, index=False)


def read(path: Path, target: str | None) -> tuple[pd.DataFrame, str]:
    """The numeric columns, gaps filled with the value before; and the target's name, by default the last column's."""
    try:
        first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
        separator = max(",;\t", key=first.count)
        parsed = [pd.read_csv(path, sep=separator, decimal=mark) for mark in (".," if separator == ";" else ".")]
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path}: {error}")
    everything = max(parsed, key=lambda table: table.select_dtypes("number").shape[1])
    everything.columns = [str(name).strip() for name in everything.columns]
    table = everything.select_dtypes("number").replace([np.inf, -np.inf], np.nan).dropna(axis="columns", how="all")
    others = [name for name in everything if name not in table]
    for name in others:
        dates = pd.to_datetime(everything[name], errors="coerce", format="mixed")
        if everything[name].dtype != float and dates.notna().all() and not dates.is_monotonic_increasing:
            print(f"rows are put in the order of {name}")
            table = table.iloc[dates.argsort(kind="stable")]
            break
    if table.empty or (target and target not in table):
        sys.exit(f"error: {path} has the numeric columns {', '.join(table) or '(none)'}; choose one by --target")
    if others:
        print(f"left out, for they are not numbers: {', '.join(others)}")
    for name, missing in table.isna().sum().items():
        if missing:
            print(f"{name}: {missing} of {len(table)} values are missing, filled with the value before")
    return table.ffill().bfill(), target or table.columns[-1]


def writable(path: Path) -> None:
    """Ends here, not after training, if no picture can be written there."""
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        sys.exit(f"error: --plot {path} must end with one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        sys.exit(f"error: --plot {path} cannot be written: {path.parent} is no folder that takes files")


def windows(values: Tensor, target: int, length: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All windows of values (rows, I): x (N, length, I), and the target `horizon` rows after each, y (N,)."""
    x = values.unfold(0, length, 1).transpose(1, 2)[: len(values) - length - horizon + 1]
    return x.contiguous(), values[length + horizon - 1 :, target]


def train(network: Forecaster, x: Tensor, y: Tensor, cost: float, epochs: int, learning_rate: float) -> None:
    """Squared error + λ * rows read."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for epoch in range(epochs):
        errors, read = [], []
        for rows in torch.randperm(len(x)).split(64):
            forecast, updates = network(x[rows])
            error = (forecast - y[rows]).square().mean()
            if not error.isfinite():
                sys.exit(f"error: the error is {error.item()} in epoch {epoch + 1}: too large a --learning-rate?")
            optimizer.zero_grad()
            (error + cost * updates.sum(1).mean()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            errors.append(error.item())
            read.append(updates.mean().item())
        print(f"epoch {epoch + 1}/{epochs}  error {np.mean(errors):.4f}  rows read {100 * np.mean(read):.0f} %")


def plot(path: Path, name: str, truth: Tensor, forecast: Tensor, window: Tensor, used: Tensor) -> None:
    """The forecast over the held-out rows; below it one window, its used rows red and the skipped ones blue."""
    figure = Figure((6, 4), layout="constrained")
    above, below = figure.subplots(2)
    above.plot(truth, color="black", linewidth=0.8, label=name)
    above.plot(forecast, color="#d55e00", linewidth=0.8, label="forecast")
    above.set_xlabel("held-out row")
    above.legend(frameon=False, ncols=2, fontsize="small")
    steps = torch.arange(1, len(window) + 1)
    below.plot(steps, window, color="#bbbbbb", linewidth=0.6)
    for chosen, colour, label in ((used, "#b2182b", "used"), (~used, "#2166ac", "skipped")):
        below.plot(steps[chosen], window[chosen], "o", color=colour, markersize=3, label=label)
    below.set(xlabel="row of the last window", ylabel=name)
    below.legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", help="the data; made up if left out")
    parser.add_argument("--target", help="the column to forecast (the last one)")
    parser.add_argument("--window", type=int, default=48, help="rows that the network may read (%(default)s)")
    parser.add_argument("--horizon", type=int, default=1, help="rows ahead (%(default)s)")
    parser.add_argument("--cost", type=float, default=1e-3, help="λ: cost of a row read (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("own_time_series.png"), help="(%(default)s)")
    given = parser.parse_args()
    torch.manual_seed(0)
    writable(given.plot)
    if given.csv is None:
        given.csv = given.plot.with_suffix(".csv")
        made_up(given.csv)
    table, target = read(given.csv, given.target)
    held_out = len(table) // 5
    if min(given.window, given.horizon) < 1 or held_out < given.window + given.horizon:
        sys.exit(f"error: {len(table)} rows are too few for --window {given.window} and --horizon {given.horizon}")
    values = torch.tensor(table.to_numpy(), dtype=torch.float32)
    column, known = table.columns.get_loc(target), values[:-held_out]
    mean, deviation = known.mean(0), known.std(0).clamp(min=1e-6)
    x, y = windows((known - mean) / deviation, column, given.window, given.horizon)
    network = Forecaster(values.shape[1])
    train(network, x, y, given.cost, given.epochs, given.learning_rate)

    x, y = windows((values[-held_out:] - mean) / deviation, column, given.window, given.horizon)
    with torch.no_grad():
        forecast, updates = network(x)
    last_value = (x[:, -1, column] - y).square().mean()
    print(f"held out: squared error {(forecast - y).square().mean():.4f} of the target's variance;", end=" ")
    print(f"the last value as forecast: {last_value:.4f}; rows read: {100 * updates.mean():.0f} %")
    truth, said, window = (part * deviation[column] + mean[column] for part in (y, forecast, x[-1, :, column]))
    plot(given.plot, target, truth, said, window, updates[-1] > 0)
    print(f"written to {given.plot}")


if __name__ == "__main__":
    main()

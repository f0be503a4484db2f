"""experiments/*.yaml: the rows of a table, and the runs that they plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from skiprnn import config as configs
from skiprnn.config import ConfigError, RunConfig
from skiprnn.runs import RunFolder

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
CONF = FOLDER.with_name("conf")
COLUMNS = ("accuracy", "state_updates", "inference_flops")


@dataclass(frozen=True)
class Row:
    """A row of a table: the Hydra overrides that make it, and what the paper says."""

    label: str
    overrides: tuple[str, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)  # metric: [mean, std], or a number


@dataclass(frozen=True)
class Experiment:
    """A table of a paper."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = COLUMNS  # of skiprnn.tables.METRICS
    published_runs: int | None = None  # that a published mean and standard deviation are of

    @property
    def data(self) -> str:
        """Its data set, after which its profiles' folder is named."""
        return next(one.removeprefix("data=") for one in self.rows[0].overrides if one.startswith("data="))


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep or a table asks for."""

    row: Row
    run: RunConfig
    overrides: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)


def load(name: str) -> Experiment:
    """Read experiments/NAME.yaml. `rows_of` takes the rows of another file, without its published numbers.

    Raises:
        ConfigError: no such file, or published deviations of an unknown number of runs.
    """
    file = FOLDER / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise ConfigError(f"experiment={name}: there are {known}")
    content = _read(file)
    common = tuple(content.get("overrides", ()))
    if "rows_of" in content:
        other = _read(FOLDER / f"{content['rows_of']}.yaml")["rows"]
        entries = [{"label": row["label"], "overrides": row["overrides"]} for row in other]
    else:
        entries = content["rows"]
    rows = tuple(Row(row["label"], common + tuple(row["overrides"]), row.get("published", {})) for row in entries)
    runs = content.get("published_runs")
    if runs is None and any(isinstance(value, list) for row in rows for value in row.published.values()):
        raise ConfigError(f"{file}: of how many runs are the published deviations? published_runs is missing")
    return Experiment(name, content["title"], content["source"], rows, tuple(content.get("columns", COLUMNS)), runs)


def published() -> list[Experiment]:
    """The experiments that have published numbers: the tables of the papers."""
    found = [load(file.stem) for file in sorted(FOLDER.glob("*.yaml"))]
    return [experiment for experiment in found if any(row.published for row in experiment.rows)]


def requested(overrides: Sequence[str]) -> tuple[Experiment, list[PlannedRun]]:
    """The experiment that overrides name, and the runs that a sweep with them would make.

    Raises:
        ConfigError: they name no experiment, or as load and plan.
        HydraException: they do not compose.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        name = hydra.compose("config", list(overrides))["experiment"]
        if not name:
            raise ConfigError("experiment=NAME is missing: which table?")
        experiment = load(name)
        return experiment, plan(experiment, [overrides], lambda given: hydra.compose("config", given))


def _read(file: Path) -> dict[str, Any]:
    """As Hydra reads conf/: 1.86e7 is a number, where plain PyYAML takes it for text."""
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def plan(
    experiment: Experiment | None,
    grid: Sequence[Sequence[str]],
    compose: Callable[[list[str]], DictConfig],
) -> list[PlannedRun]:
    """All runs of a sweep: rows × grid × seeds, in that order.

    Args:
        experiment: its rows; None for a plain grid.
        grid: combinations of overrides for every row. What varies in it, but for the seed, makes further rows. An
            experiment's runs take the profile's seeds unless the grid names some.
        compose: Hydra's composition of a list of overrides.

    Raises:
        ConfigError: nothing to run, or one run asked for twice.
    """
    runs = []
    numbers = compose(list(grid[0]))["rows"] if grid else None
    for row in selected(experiment, numbers) if experiment else [Row("")]:
        for combination in grid:
            overrides = _last_wins([*row.overrides, *combination])
            varying = [one for one in combination if not one.startswith("seed=") and any(one not in c for c in grid)]
            label = ", ".join([row.label, *varying] if row.label else varying)
            composed = compose(overrides)
            run, labelled = configs.read(composed), replace(row, label=label)
            if experiment and not any(override.startswith("seed=") for override in overrides):
                for seed in composed["seeds"]:
                    runs.append(PlannedRun(labelled, replace(run, seed=seed), (*overrides, f"seed={seed}")))
            else:
                runs.append(PlannedRun(labelled, run, tuple(overrides)))
    if not runs:
        raise ConfigError("the sweep holds no runs: check its overrides")
    labels = list(dict.fromkeys(planned.row.label for planned in runs))
    runs.sort(key=lambda planned: labels.index(planned.row.label))  # the runs of a row side by side
    names = [planned.run.name for planned in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the sweep asks for the same run twice: {', '.join(twice)}")
    return runs


def selected(experiment: Experiment, numbers: Sequence[int] | None) -> list[Row]:
    """The experiment's rows with these numbers, from 1; all for None.

    Raises:
        ConfigError: there is no such row.
    """
    if numbers is None:
        return list(experiment.rows)
    count = len(experiment.rows)
    if not numbers or not all(isinstance(number, int) and 1 <= number <= count for number in numbers):
        raise ConfigError(f"rows={list(numbers)}: {experiment.name} has rows 1 to {count}")
    return [experiment.rows[number - 1] for number in numbers]


def _last_wins(overrides: Sequence[str]) -> list[str]:
    """One override per key, the last one given: what a user says comes after what a row says."""
    return list({override.split("=", 1)[0]: override for override in overrides}.values())

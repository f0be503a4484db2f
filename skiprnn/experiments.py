"""experiments/*.yaml: the rows of a table, and the runs that they plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from skiprnn import config as configs
from skiprnn.config import ConfigError, RunConfig
from skiprnn.runs import RunFolder

FOLDER = Path(__file__).resolve().parent.parent / "experiments"


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

    def folder(self, run: RunConfig) -> Path:
        """Where its table and figures go, unless they are published, from one of its runs."""
        return Path(run.output) / "tables" / f"{self.name}_{run.profile.get('name', 'custom')}"


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
        ConfigError: no such file.
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
    return Experiment(name, content["title"], content["source"], rows)


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
            seeds = [""]
            if experiment and not any(override.startswith("seed=") for override in overrides):
                seeds = [f"seed={seed}" for seed in compose(overrides)["seeds"]]
            for seed in seeds:
                final = [*overrides, seed] if seed else overrides
                runs.append(PlannedRun(replace(row, label=label), configs.read(compose(final)), tuple(final)))
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


def asked_for(arguments: Sequence[str]) -> tuple[Experiment | None, list[PlannedRun], Path | None]:
    """What a command line asks for: the experiment if it names one, the runs that a sweep over it has, publish=FOLDER.

    Raises:
        ConfigError: an override that cannot work, an unknown experiment.
    """
    overrides = [argument for argument in arguments if not argument.startswith("publish=")]
    folders = [Path(argument.removeprefix("publish=")) for argument in arguments if argument.startswith("publish=")]

    def compose(given: Sequence[str]) -> DictConfig:
        return hydra.compose("config", list(given))

    try:
        grid = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)[0]
        with hydra.initialize_config_dir(str(FOLDER.parent / "conf"), version_base="1.3"):
            name = compose(grid[0])["experiment"]
            experiment = load(name) if name else None
            return experiment, plan(experiment, grid, compose), folders[-1] if folders else None
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _last_wins(overrides: Sequence[str]) -> list[str]:
    """One override per key, the last one given: what a user says comes after what a row says."""
    return list({override.split("=", 1)[0]: override for override in overrides}.values())

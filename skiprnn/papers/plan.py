"""What a sweep or a table asks for: rows × grid × seeds -> runs; and a sweep's plan, kept for whoever watches."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skiprnn.papers.experiments import METRICS, Experiment, Row, load
from skiprnn.training import command_line
from skiprnn.training.config import ConfigError, RunConfig, fits, packaged
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.measures import SCORES

if TYPE_CHECKING:  # only who composes a plan needs it; a saved one is read without
    from omegaconf import DictConfig

HOW = ("output", "data_root", "engine", "device", "threads", "pack", "logger")  # no part of what a run is


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep or a table asks for."""

    row: Row
    run: RunConfig
    overrides: tuple[str, ...]

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)


def requested(arguments: Sequence[str]) -> tuple[Experiment, list[PlannedRun], Path | None]:
    """What a command line asks for: the experiment or the grid, the runs that a sweep over it has, publish=FOLDER.

    How the sweep would be launched (hydra/...) is of no matter.

    Raises:
        ConfigError: an override that cannot work, an unknown experiment.
    """
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [argument for argument in arguments if not argument.startswith(("publish=", "hydra/", "hydra."))]
    folders = [Path(argument.removeprefix("publish=")) for argument in arguments if argument.startswith("publish=")]

    def compose(given: Sequence[str]) -> "DictConfig":
        return hydra.compose("config", list(given), return_hydra_config=True)

    with command_line.refusals(arguments):
        grid = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)[0]
        with hydra.initialize_config_dir(str(packaged("conf")), version_base="1.3"):
            name = compose(grid[0] if grid else [])["experiment"]
            experiment = load(name) if name else None
            planned = runs(experiment, grid, compose)
            return experiment or plain(" ".join(overrides)), planned, folders[-1] if folders else None


def runs(
    experiment: Experiment | None,
    grid: Sequence[Sequence[str]],
    compose: Callable[[list[str]], "DictConfig"],
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
    rows: dict[str, list[PlannedRun]] = {}  # the runs of a row side by side
    read = _Reader(compose)
    if not experiment:
        command_line.require_experiment([one for combination in grid for one in combination])
    numbers = command_line.read_sweep(compose(list(grid[0]))).rows if grid else None
    occurrences = Counter(override for combination in grid for override in set(combination))
    for row in selected(experiment, numbers) if experiment else [Row("")]:
        for combination in grid:
            overrides = _last_wins([*row.overrides, *combination])
            varying = [one for one in combination if not one.startswith("seed=") and occurrences[one] < len(grid)]
            label = ", ".join([row.label, *varying] if row.label else varying)
            finals = [overrides]
            if experiment and not any(override.startswith("seed=") for override in overrides):
                finals = [[*overrides, f"seed={seed}"] for seed in read.seeds(overrides)]
            for final in finals:
                run = read(final)
                rows.setdefault(label, []).append(PlannedRun(replace(row, label=label or run.row), run, tuple(final)))
    planned = [one for group in rows.values() for one in group]
    if not planned:
        raise ConfigError("the sweep holds no runs: check its overrides")
    twice = sorted(name for name, count in Counter(one.run.name for one in planned).items() if count > 1)
    if twice:
        raise ConfigError(f"the sweep asks for the same run twice: {', '.join(twice)}")
    return planned


class _Reader:
    """Overrides -> the checked run, for thousands of them: Hydra takes a tenth of a second to compose a config.

    So it composes once per choice of config groups; plain values (`model.cost_per_sample=1e-5`) and the seed, which it
    would set last, are set on the run. What cannot be set is left to Hydra, for its error.
    """

    SEED, VALUE = re.compile(r"seed=\d+"), re.compile(r"(\w+\.)+\w+=[\w.+-]+")

    def __init__(self, compose: Callable[[list[str]], "DictConfig"]):
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.compose, self.parser = compose, OverridesParser.create()
        self.composed = cache(lambda groups: compose(list(groups)))
        self.base = cache(lambda groups: command_line.read(self.composed(groups)))
        self.but_for_seed = cache(self._but_for_seed)

    def __call__(self, overrides: Sequence[str]) -> RunConfig:
        seeds = [override for override in overrides if self.SEED.fullmatch(override)]
        run = self.but_for_seed(tuple(override for override in overrides if override not in seeds))
        return replace(run, seed=int(seeds[-1].removeprefix("seed="))) if seeds else run

    def seeds(self, overrides: Sequence[str]) -> list[int]:
        """The profile's."""
        return command_line.read_sweep(self.composed(self._groups(overrides))).seeds

    def _groups(self, overrides: Sequence[str]) -> tuple[str, ...]:
        return tuple(override for override in overrides if not self.VALUE.fullmatch(override))

    def _but_for_seed(self, overrides: tuple[str, ...]) -> RunConfig:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        groups = self._groups(overrides)
        try:
            run = self.base(groups)
            for value in self.parser.parse_overrides([one for one in overrides if one not in groups]):
                group, key = value.get_key_element().split(".", 1)
                if OmegaConf.select(self.composed(groups), f"{group}.{key}", default=self) is self:
                    raise ConfigError(f"no {key} in {group}")
                section = OmegaConf.create(getattr(run, group))
                OmegaConf.update(section, key, value.value())
                changed: dict[str, Any] = {group: OmegaConf.to_object(section)}
                run = replace(run, **changed)
        except (OmegaConfBaseException, ConfigError):
            return command_line.read(self.compose(list(overrides)))
        return run


@dataclass(frozen=True)
class SavedPlan:
    """What a sweep planned, as it is kept in OUTPUT/sweeps/ for whoever watches."""

    experiment: Experiment  # its rows are the planned ones; of a plain grid, the title is what the command asks for
    command: str  # the overrides, as typed
    planned: tuple[PlannedRun, ...]


def plain(command: str) -> Experiment:
    """What stands for the experiment of a grid that names none; its title is what the command asks for."""
    left_out = re.compile(rf"({'|'.join(HOW)}|publish|hydra[/.].*)=")
    return Experiment("", " ".join(one for one in command.split() if not left_out.match(one)), "", ())


def apart(
    experiment: Experiment, planned: Sequence[PlannedRun], folder: Path | None = None
) -> list[tuple[Experiment, list[PlannedRun]]]:
    """A sweep's tables: one for each data set. A plain grid's have the columns of their task, and a name of their own.

    Raises:
        ConfigError: several tables for one folder.
    """
    groups: dict[str, list[PlannedRun]] = {}
    for one in planned:
        groups.setdefault(one.run.data["name"], []).append(one)
    tables = []
    for data, group in groups.items():
        title = f"{experiment.title} ({data})" if len(groups) > 1 else experiment.title
        table = replace(experiment, title=title)
        if not experiment.name:
            record = next((one.folder.record() for one in group if one.folder.complete), {})
            score = SCORES[record.get("task", "classification")]
            table = replace(table, name=f"{data}-{digest(group)}", columns=(score, *experiment.columns[1:]))
        tables.append((table, group))
    if folder and len(tables) > 1:
        raise ConfigError(f"publish={folder}: {len(tables)} data sets make {len(tables)} tables; publish one at a time")
    return tables


def digest(planned: Sequence[PlannedRun]) -> str:
    """Eight hexadecimal digits that name these runs."""
    return hashlib.sha256(" ".join(one.run.name for one in planned).encode()).hexdigest()[:8]


def save_plan(experiment: Experiment | None, command: str, planned: Sequence[PlannedRun]) -> None:
    """Keep a sweep's plan; the same runs, planned again, replace it. A row's runs differ in the seed alone."""
    experiment = experiment or plain(command)
    rows: dict[str, dict[str, Any]] = {}
    for one in planned:
        identity = one.run.identity
        seed = identity.pop("seed")
        row = {"label": one.row.label, "published": one.row.published, "config": identity, "seeds": []}
        rows.setdefault(one.row.label, row)["seeds"].append(seed)
    folder = Path(planned[0].run.output) / "sweeps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={planned[0].run.output}: cannot write {folder}: {error.strerror}") from None
    content = {
        "experiment": asdict(replace(experiment, rows=())),
        "command": command,
        "profile": planned[0].run.profile,
        "rows": list(rows.values()),
    }
    write_atomically(folder / f"{digest(planned)}.json", json.dumps(content).encode())


def saved_plans(output: Path, tell: Callable[[str], object]) -> list[SavedPlan]:
    """The plans of all sweeps into an output folder, latest first; what is wrong with the others is told."""
    files = sorted((output / "sweeps").glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    plans = []
    for file in files:
        try:
            content = json.loads(file.read_bytes())
            _require_sound(content)
            settings = {"output": str(output), "profile": content["profile"]}
            planned = [
                PlannedRun(row, RunConfig.of(entry["config"] | {"seed": seed}, **settings), ())
                for entry in content["rows"]
                for row in [Row(entry["label"], published=entry["published"])]
                for seed in entry["seeds"]
            ]
            plans.append(SavedPlan(Experiment(**content["experiment"]), content["command"], tuple(planned)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            tell(f"{file} is damaged, or another version's; delete it, and the sweep's next start writes it again")
    return plans


def _require_sound(content: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless a saved plan has what is shown of it."""
    columns = content["experiment"]["columns"]
    if not METRICS.keys() >= set(columns) or not any(name.startswith("state_updates") for name in columns):
        raise ValueError(columns)
    for row in content["rows"]:
        known = [one for value in row["published"].values() for one in (value if type(value) is list else [value])]
        if not fits(row["label"], str) or not all(fits(one, float) or fits(one, bool) for one in known):
            raise TypeError(row["label"])


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

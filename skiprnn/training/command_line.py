"""What was typed: Hydra's composed config -> the checked run; what is wrong with it, in one line."""

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skiprnn.training.config import ConfigError, RunConfig, packaged, require, without_retired

if TYPE_CHECKING:  # only a composed config needs it: runs that files describe are trained without
    from omegaconf import DictConfig


@dataclass
class SweepConfig:
    """What belongs to a sweep as a whole."""

    seeds: list[int] = field(default_factory=lambda: [0])  # of every row of an experiment
    rows: list[int] | None = None  # of the experiment, by number from 1; None: all
    # share of the steps that are updates, to which a search (hydra/sweeper=optuna) comes near; None: it seeks the score
    target_updates: float | None = None

    def __post_init__(self):
        for name, numbers, least in (("seeds", self.seeds, 0), ("rows", self.rows, 1)):
            require(
                numbers is None or (len(numbers) == len(set(numbers)) > 0 and min(numbers) >= least),
                f"{name}={numbers}: must be different numbers from {least} on, such as [{least}, {least + 1}]",
            )
        require(
            self.target_updates is None or 0 < self.target_updates <= 1,
            f"target_updates={self.target_updates}: must be a share of the steps, above 0 and at most 1",
        )


def read(config: "DictConfig") -> RunConfig:
    """The checked run of a composed Hydra config.

    Raises:
        ConfigError: unknown key, wrong type, or a value out of its range.
    """
    if "hydra" in config:
        require_own_profile(config.hydra)
    sweep = read_sweep(config)
    return _checked(RunConfig, config, [str(key) for key in config if key != "hydra" and not hasattr(sweep, str(key))])


def read_sweep(config: "DictConfig") -> SweepConfig:
    """What a composed Hydra config says of a sweep as a whole, checked.

    Raises:
        ConfigError: as `read`.
    """
    return _checked(SweepConfig, config, [one.name for one in fields(SweepConfig)])


def _checked(kind: type, config: "DictConfig", keys: list[str]) -> Any:
    from omegaconf import DictConfig, OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        given = OmegaConf.masked_copy(config, keys)
        if isinstance(given.get("model"), DictConfig):
            with open_dict(given):
                without_retired(given.model)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        said = str(error).splitlines()[0]
        said = said.replace("AnyNode is not a ListConfig, list or tuple", "no list, such as [1, 2]")
        raise ConfigError(f"{key}{said}") from None


@contextmanager
def refusals(arguments: Sequence[str]) -> Iterator[None]:
    """Within, what Hydra has against a command line becomes a ConfigError of one line: what it raises itself is about
    the command line, also where it is no HydraException.

    Args:
        arguments: the command line; where Hydra does not name the one that it is about, it is put before.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        of_hydra = isinstance(error, (HydraException, OmegaConfBaseException))
        if not of_hydra and Path(hydra.__file__).parent not in raised_in.parents:
            raise
        said = str(error).partition("Config search path:")[0]
        unnamed = [one for one in arguments if one.endswith("=null")] if "Config group override" in said else []
        raise ConfigError(": ".join([*unnamed, " ".join(said.split())])) from None


def require_own_profile(command: Any) -> None:
    """Raises ConfigError where a data set that has profiles would be trained by another one's; conf/profile/NAME.yaml,
    in no data set's folder, is for any.

    Args:
        command: Hydra's own config: what was typed, and the choices of config groups.
    """
    data, profile = command.runtime.choices["data"], command.runtime.choices["profile"]
    own = {file.stem for folder in (packaged("conf"), Path("conf")) for file in folder.glob(f"profile/{data}/*.yaml")}
    typed = any(one.startswith(("experiment=", "data=")) for one in command.overrides.task)
    whose = "" if typed else f"experiment=NAME or data={str(profile).partition('/')[0]}, or "
    require(
        not own or "/" not in str(profile) or str(profile).startswith(f"{data}/"),
        f"profile={profile} is not for data={data}: add {whose}profile={data}/NAME, of {', '.join(sorted(own))}",
    )


def require_experiment(overrides: Sequence[str]) -> None:
    """Raises ConfigError where a command line without an experiment has what only experiments know."""
    for one in overrides:
        require(not one.startswith(("seeds=", "rows=")), f"{one}: add experiment=NAME, whose it is; or -m and seed=0,1")


def arguments_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, refused in one line."""
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")  # type: ignore[method-assign]
    return parser.parse_args(arguments)

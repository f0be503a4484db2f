"""What a run is made of: the schema of the composed Hydra config, and what it checks before anything starts."""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_type_hints

from skiprnn.model.cells import CELLS
from skiprnn.model.engines import ENGINES
from skiprnn.model.policies import POLICIES

if TYPE_CHECKING:  # only a composed config needs it: runs that files describe are trained without
    from omegaconf import DictConfig


def packaged(name: str) -> Path:
    """The folder conf or experiments: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that names the setting and the remedy."""


class DivergedError(RuntimeError):
    """A run's loss became nan or infinite.

    Args:
        message: one line.
        run: whose.
    """

    def __init__(self, message: str, run: "RunConfig | None" = None):
        super().__init__(message)
        self.run = run


ADDED = {
    "added": True
}  # metadata of later options: no part of a run's identity at their default, so older runs keep their hash
RETIRED = {"layer_norm": False}  # former options of a model: every identity has them, at the only value that is left


NAME = re.compile(r"\w[\w.+-]{,99}")  # of what makes a folder's name
NAMING = "letters, digits, _ . + and - make a name, at most 100 of them"
LARGEST_FLOAT = 1e30  # float32 has room for sums of such
LARGEST = {"hidden_size": 2**16, "num_layers": 2**10, "embedding_size": 2**16, "threads": 2**10, "batch_size": 2**24}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_sizes(part: str, settings: Any, *names: str) -> None:
    """Of settings that are None or a number from 1 on."""
    for name in names:
        value, largest = getattr(settings, name), LARGEST.get(name, 2**40)
        _require(value is None or value >= 1, f"{part}{name}={value}: must be at least 1")
        _require(value is None or value <= largest, f"{part}{name}={value}: must be at most {largest}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a file has the type of a parameter; True where the annotation does not say."""
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if annotation in (int, bool, str, dict, list):
        return type(value) is annotation
    return not isinstance(annotation, UnionType) or any(
        value is None if kind is NoneType else fits(value, kind) for kind in annotation.__args__
    )


_types = cache(get_type_hints)


def _of(kind: type, given: Any) -> Any:
    """A config from what a file says.

    Raises:
        TypeError: an unknown or missing option, or a value of another type.
    """
    for name, value in dict(given).items():
        if name in _types(kind) and not fits(value, _types(kind)[name]):
            raise TypeError(f"{name}={value}")
    return kind(**given)


@dataclass
class ModelConfig:
    """conf/model/*.yaml: a cell under a policy, and the budget."""

    name: str
    cell: str  # a name in skiprnn.model.cells.CELLS
    policy: str  # a name in skiprnn.model.policies.POLICIES
    hidden_size: int  # H, of every layer
    num_layers: int = 1  # L
    learn_initial_state: bool = True
    cost_per_sample: float = 0.0  # λ, loss per state update of a sequence
    embedding_size: int = 300  # width of a word's embedding, for text
    dropout: float = 0.0  # before the readout
    p_skip: float | None = None  # policies that draw: probability of skipping

    def __post_init__(self):
        _require(self.cell in CELLS, f"model.cell={self.cell}: there are {', '.join(CELLS)}")
        _require(self.policy in POLICIES, f"model.policy={self.policy}: there are {', '.join(POLICIES)}")
        _require(bool(NAME.fullmatch(self.name)), f"model.name={self.name}: {NAMING}")
        _require_sizes("model.", self, "hidden_size", "num_layers", "embedding_size")
        _require(
            0 <= self.cost_per_sample <= LARGEST_FLOAT,
            f"model.cost_per_sample={self.cost_per_sample}: λ must be finite and not negative, at most {LARGEST_FLOAT}",
        )
        _require(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be in [0, 1)")
        draws = POLICIES[self.policy].draws
        _require(draws or self.p_skip is None, f"model.p_skip: policy {self.policy} draws nothing; remove it")
        _require(not draws or self.p_skip is not None, f"model.p_skip: policy {self.policy} needs it")
        _require(
            self.p_skip is None or 0 <= self.p_skip <= 1,
            f"model.p_skip={self.p_skip}: a probability lies in [0, 1]",
        )


@dataclass
class TrainingConfig:
    """conf/profile/*: the protocol."""

    epochs: int
    batch_size: int
    learning_rate: float  # Adam, β = (0.9, 0.999), ε = 1e-8
    gradient_clip: float = 1.0  # largest global norm of the gradient
    cost_free_epochs: int = 0  # λ counts as 0 in so many epochs at the start; 0 as published
    decay_epochs: int = 0  # the learning rate falls in equal steps in so many epochs at the end; 0 as published
    # it rises in equal steps in so many epochs at the start; 0 as published
    warmup_epochs: int = dataclasses.field(default=0, metadata=ADDED)
    train_batches: int | None = None  # of each epoch; None: all
    evaluation_batches: int | None = None  # of validation and test; None: all

    def __post_init__(self):
        _require_sizes("training.", self, "epochs", "batch_size", "train_batches", "evaluation_batches")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            _require(
                0 < value <= LARGEST_FLOAT,
                f"training.{name}={value}: must be positive and finite, at most {LARGEST_FLOAT}",
            )
        _require(
            0 <= self.cost_free_epochs < self.epochs,
            f"training.cost_free_epochs={self.cost_free_epochs}: must be at least 0 and below epochs={self.epochs}",
        )
        _require(
            0 <= self.decay_epochs <= self.epochs,
            f"training.decay_epochs={self.decay_epochs}: must be at least 0 and at most epochs={self.epochs}",
        )
        _require(
            0 <= self.warmup_epochs <= self.epochs - self.decay_epochs,
            f"training.warmup_epochs={self.warmup_epochs}: must be at least 0 and at most "
            f"{self.epochs - self.decay_epochs}, the epochs before the learning rate falls",
        )


@dataclass
class RunConfig:
    """One run: one seed of one row. `data` holds the data class (`_target_`) and its arguments."""

    data: dict[str, Any]
    model: ModelConfig
    training: TrainingConfig
    seed: int
    data_root: str = "data"  # where data files are kept
    output: str = "outputs"  # where run folders are made
    engine: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    pack: int | None = None  # runs of a row that a job trains at once; None: all on a GPU, one on a CPU
    threads: int | None = None  # CPU threads; None: torch's choice
    logger: dict[str, Any] = dataclasses.field(default_factory=dict)
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)  # name and note of the protocol, for captions
    experiment: str | None = None

    def __post_init__(self):
        _require(self.engine in ("auto", *ENGINES), f"engine={self.engine}: there are auto, {', '.join(ENGINES)}")
        _require(self.device in ("auto", "cpu", "cuda"), f"device={self.device}: there are auto, cpu, cuda")
        _require_sizes("", self, "pack", "threads")
        _require(0 <= self.seed < 2**63, f"seed={self.seed}: must be 0 or more, and below 2**63")
        for part, name in (("data", self.data.get("name")), ("profile", self.profile.get("name", "custom"))):
            _require(
                isinstance(name, str) and bool(NAME.fullmatch(name)),
                f"{part}.name={name}: {NAMING}",
            )
        for key in ("note", "published"):
            value = self.profile.get(key, "")
            _require(isinstance(value, str), f"profile.{key}={value}: must be a text")

    @classmethod
    def of(cls, identity: dict[str, Any], **settings: Any) -> "RunConfig":
        """The run of an `identity`, as run folders and records hold it.

        Raises:
            ConfigError: another version's.
        """
        try:
            model = _of(ModelConfig, _without_retired(dict(identity["model"])))
            training = _of(TrainingConfig, identity["training"])
            if not isinstance(identity["data"], dict) or not fits(identity["seed"], int):
                raise TypeError("data or seed")
            return cls(identity["data"], model, training, identity["seed"], **settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a run of another version of skiprnn, or a damaged one: {error}") from None

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the result, and nothing else: how and where it is computed may change between resumptions."""
        return {
            "data": self.data,
            "model": RETIRED | _settings(self.model),
            "training": _settings(self.training),
            "seed": self.seed,
        }

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def row(self) -> str:
        """Readable name of model and budget, such as skip_lstm_lambda0.0001."""
        name = self.model.name
        if self.model.p_skip is not None:
            name += f"_p{self.model.p_skip:g}"
        if POLICIES[self.model.policy].learned:
            name += f"_lambda{self.model.cost_per_sample:g}"
        return name

    @property
    def name(self) -> str:
        """Readable and unique: dataset, model and budget, seed, hash."""
        return f"{self.data['name']}/{self.row}/seed{self.seed}_{self.hash}"


@dataclass
class SweepConfig:
    """What belongs to a sweep as a whole."""

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])  # of every row of an experiment
    rows: list[int] | None = None  # of the experiment, by number from 1; None: all
    # share of the steps that are updates, to which a search (hydra/sweeper=optuna) comes near; None: it seeks the score
    target_updates: float | None = None

    def __post_init__(self):
        for name, numbers, least in (("seeds", self.seeds, 0), ("rows", self.rows, 1)):
            _require(
                numbers is None or (len(numbers) == len(set(numbers)) > 0 and min(numbers) >= least),
                f"{name}={numbers}: must be different numbers from {least} on, such as [{least}, {least + 1}]",
            )
        _require(
            self.target_updates is None or 0 < self.target_updates <= 1,
            f"target_updates={self.target_updates}: must be a share of the steps, above 0 and at most 1",
        )


def _settings(part: Any) -> dict[str, Any]:
    """A config's values, without those of later options that stand at their default."""
    fields = dataclasses.fields(part)
    left_out = {
        field.name for field in fields if field.metadata == ADDED and getattr(part, field.name) == field.default
    }
    return {name: value for name, value in dataclasses.asdict(part).items() if name not in left_out}


def _without_retired(model: Any) -> Any:
    """A model's options, the retired ones taken out.

    Raises:
        ConfigError: one has another value than the one that is left.
    """
    for name, value in RETIRED.items():
        found = model.pop(name, value)
        _require(found == value, f"model.{name}={found}: there is no such option any more; remove it")
    return model


def read(config: "DictConfig") -> RunConfig:
    """The checked run of a composed Hydra config.

    Raises:
        ConfigError: unknown key, wrong type, or a value out of its range.
    """
    if "hydra" in config:
        require_own_profile(config.hydra)
    sweep = read_sweep(config)
    run = _checked(RunConfig, config, [str(key) for key in config if key != "hydra" and not hasattr(sweep, str(key))])
    assert isinstance(run, RunConfig)
    return run


def read_sweep(config: "DictConfig") -> SweepConfig:
    """What a composed Hydra config says of a sweep as a whole, checked.

    Raises:
        ConfigError: as `read`.
    """
    sweep = _checked(SweepConfig, config, [field.name for field in dataclasses.fields(SweepConfig)])
    assert isinstance(sweep, SweepConfig)
    return sweep


def _checked(kind: type, config: "DictConfig", keys: list[str]) -> Any:
    from omegaconf import DictConfig, OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        given = OmegaConf.masked_copy(config, keys)
        if isinstance(given.get("model"), DictConfig):
            with open_dict(given):
                _without_retired(given.model)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        said = (
            str(error).splitlines()[0].replace("AnyNode is not a ListConfig, list or tuple", "no list, such as [1, 2]")
        )
        raise ConfigError(f"{key}{said}") from None


def in_one_line(error: Exception, arguments: Sequence[str]) -> str:
    """What an error of Hydra's says, without where it has searched; with the argument where it does not name it."""
    said = str(error).partition("Config search path:")[0]
    unnamed = [one for one in arguments if one.endswith("=null")] if "Config group override" in said else []
    return ": ".join([*unnamed, " ".join(said.split())])


def is_of_hydra(error: Exception) -> bool:
    """Whether Hydra has raised it itself: then it is about the command line, also where it is no HydraException."""
    import hydra

    return Path(hydra.__file__).parent in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


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
    _require(
        not own or "/" not in str(profile) or str(profile).startswith(f"{data}/"),
        f"profile={profile} is not for data={data}: add {whose}profile={data}/NAME, of {', '.join(sorted(own))}",
    )


def require_experiment(overrides: Sequence[str]) -> None:
    """Raises ConfigError where a command line without an experiment has what only experiments know."""
    for one in overrides:
        _require(
            not one.startswith(("seeds=", "rows=")), f"{one}: add experiment=NAME, whose it is; or -m and seed=0,1"
        )


def arguments_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, refused in one line."""
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")  # type: ignore[method-assign]
    return parser.parse_args(arguments)

"""What a run is made of: its settings, which are checked before anything starts, and its identity."""

import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_type_hints

from skiprnn.model.cells import CELLS
from skiprnn.model.engines import ENGINES
from skiprnn.model.policies import POLICIES

PACKAGE = Path(__file__).resolve().parents[1]


def packaged(name: str) -> Path:
    """The folder conf or experiments: in the installed package, or beside it in a checkout."""
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())


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


# metadata of later options: no part of a run's identity at their default, so older runs keep their hash
ADDED = {"added": True}
RETIRED = {"layer_norm": False}  # former options of a model: every identity has them, at the only value that is left
NAME = re.compile(r"\w[\w.+-]{,99}")  # of what makes a folder's name
NAMING = "letters, digits, _ . + and - make a name, at most 100 of them"
LARGEST_FLOAT = 1e30  # float32 has room for sums of such
LARGEST = {"hidden_size": 2**16, "num_layers": 2**10, "embedding_size": 2**16, "threads": 2**10, "batch_size": 2**24}


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def require_sizes(part: str, settings: Any, *names: str) -> None:
    """Of settings that are None or a number from 1 on."""
    for name in names:
        value, largest = getattr(settings, name), LARGEST.get(name, 2**40)
        require(value is None or value >= 1, f"{part}{name}={value}: must be at least 1")
        require(value is None or value <= largest, f"{part}{name}={value}: must be at most {largest}")


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
        require(self.cell in CELLS, f"model.cell={self.cell}: there are {', '.join(CELLS)}")
        require(self.policy in POLICIES, f"model.policy={self.policy}: there are {', '.join(POLICIES)}")
        require(bool(NAME.fullmatch(self.name)), f"model.name={self.name}: {NAMING}")
        require_sizes("model.", self, "hidden_size", "num_layers", "embedding_size")
        require(
            0 <= self.cost_per_sample <= LARGEST_FLOAT,
            f"model.cost_per_sample={self.cost_per_sample}: λ must be finite and not negative, at most {LARGEST_FLOAT}",
        )
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be in [0, 1)")
        draws = POLICIES[self.policy].draws
        require(draws or self.p_skip is None, f"model.p_skip: policy {self.policy} draws nothing; remove it")
        require(not draws or self.p_skip is not None, f"model.p_skip: policy {self.policy} needs it")
        require(
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
        require_sizes("training.", self, "epochs", "batch_size", "train_batches", "evaluation_batches")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            require(
                0 < value <= LARGEST_FLOAT,
                f"training.{name}={value}: must be positive and finite, at most {LARGEST_FLOAT}",
            )
        require(
            0 <= self.cost_free_epochs < self.epochs,
            f"training.cost_free_epochs={self.cost_free_epochs}: must be at least 0 and below epochs={self.epochs}",
        )
        require(
            0 <= self.decay_epochs <= self.epochs,
            f"training.decay_epochs={self.decay_epochs}: must be at least 0 and at most epochs={self.epochs}",
        )
        require(
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
        require(self.engine in ("auto", *ENGINES), f"engine={self.engine}: there are auto, {', '.join(ENGINES)}")
        require(self.device in ("auto", "cpu", "cuda"), f"device={self.device}: there are auto, cpu, cuda")
        require_sizes("", self, "pack", "threads")
        require(0 <= self.seed < 2**63, f"seed={self.seed}: must be 0 or more, and below 2**63")
        for part, name in (("data", self.data.get("name")), ("profile", self.profile.get("name", "custom"))):
            require(
                isinstance(name, str) and bool(NAME.fullmatch(name)),
                f"{part}.name={name}: {NAMING}",
            )
        for key in ("note", "published"):
            value = self.profile.get(key, "")
            require(isinstance(value, str), f"profile.{key}={value}: must be a text")

    @classmethod
    def of(cls, identity: dict[str, Any], **settings: Any) -> "RunConfig":
        """The run of an `identity`, as run folders and records hold it.

        Raises:
            ConfigError: another version's.
        """
        try:
            model = _of(ModelConfig, without_retired(dict(identity["model"])))
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


def _settings(part: Any) -> dict[str, Any]:
    """A config's values, without those of later options that stand at their default."""
    fields = dataclasses.fields(part)
    left_out = {
        field.name for field in fields if field.metadata == ADDED and getattr(part, field.name) == field.default
    }
    return {name: value for name, value in dataclasses.asdict(part).items() if name not in left_out}


def without_retired(model: Any) -> Any:
    """A model's options, the retired ones taken out.

    Raises:
        ConfigError: one has another value than the one that is left.
    """
    for name, value in RETIRED.items():
        found = model.pop(name, value)
        require(found == value, f"model.{name}={found}: there is no such option any more; remove it")
    return model

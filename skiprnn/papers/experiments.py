"""experiments/*.yaml: the rows of a table, what the paper says of them, and how they are compared with it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skiprnn.training.config import ConfigError, RunConfig, packaged

FOLDER, OWN = packaged("experiments"), Path("experiments")  # OWN: where a command is started
CLAIMS = "claims"  # the file there that is no table
COLUMNS = ("accuracy", "state_updates", "inference_flops")


@dataclass(frozen=True)
class Metric:
    """A column: its heading, and the digits shown (None: as a power of ten)."""

    heading: str
    digits: int | None = None
    share: bool = False  # of the runs: shown as yes or no, without a spread


SOLVED, UPDATES = "task_solved", "state_updates"
METRICS = {
    SOLVED: Metric("Task solved", 2, share=True),
    "accuracy": Metric("Accuracy", 3),
    "mse": Metric("MSE", 6),
    UPDATES: Metric("State updates", 2),
    "state_updates_percent": Metric("State updates (%)", 1),
    "inference_flops": Metric("Inference FLOPs"),
    "inference_flops_with_cnn": Metric("Inference FLOPs with the CNN"),
}
LAST = "last_"  # before a metric's name: at the last epoch; FLOPs follow from the updates
METRICS |= {
    LAST + name: replace(metric, heading=f"{metric.heading} (last epoch)")
    for name, metric in METRICS.items()
    if "flops" not in name
}


@dataclass(frozen=True)
class Row:
    """A row of a table: the Hydra overrides that make it, and what the paper says."""

    label: str
    overrides: tuple[str, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)  # metric: [mean, std], or a number

    def paper(self, metric: str) -> tuple[Any, float | None]:
        """Published mean and standard deviation; None where there is none."""
        value = self.published.get(metric)
        return tuple(value) if isinstance(value, list) else (value, None)


@dataclass(frozen=True)
class Experiment:
    """A table of a paper."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = COLUMNS  # of METRICS
    published_runs: int | None = None  # that a published mean and standard deviation are of
    # of a metric that is compared: the difference that does not matter; of state_updates as a share of the steps
    margins: dict[str, float] = field(default_factory=dict)
    published_data: dict[str, Any] = field(default_factory=dict)  # what a record says if its data are the paper's

    @property
    def score(self) -> str:
        """What its networks are measured by: "mse" or "accuracy"."""
        return "mse" if "mse" in self.columns else "accuracy"

    @property
    def data(self) -> str:
        """Its data set, after which its profiles' folder is named."""
        return next(one.removeprefix("data=") for one in self.rows[0].overrides if one.startswith("data="))

    def folder(self, run: RunConfig) -> Path:
        """Where its table and figures go, unless they are published, from one of its runs."""
        return Path(run.output) / "tables" / f"{self.name}_{run.profile.get('name', 'custom')}"


def files() -> dict[str, Path]:
    """Of all experiments, ours or the user's own, by name."""
    found = {file.stem: file for folder in (OWN, FOLDER) for file in sorted(folder.glob("*.yaml"))}
    return {name: file for name, file in found.items() if name != CLAIMS}


def load(name: str) -> Experiment:
    """Read experiments/NAME.yaml, ours or the user's own.

    Raises:
        ConfigError: no such file, or published deviations of an unknown number of runs.
    """
    known = files()
    if name not in known:
        raise ConfigError(f"experiment={name}: there are {', '.join(sorted(known))}")
    content = read(known[name])
    common = tuple(content.get("overrides", ()))
    rows = tuple(
        Row(row["label"], common + tuple(row["overrides"]), row.get("published", {})) for row in content["rows"]
    )
    runs = content.get("published_runs")
    if runs is None and any(isinstance(value, list) for row in rows for value in row.published.values()):
        raise ConfigError(f"{known[name]}: of how many runs are the published deviations? published_runs is missing")
    columns, margins, data = (content.get(key) for key in ("columns", "margins", "published_data"))
    return Experiment(
        name, content["title"], content["source"], rows, tuple(columns or COLUMNS), runs, margins or {}, data or {}
    )


def published() -> list[Experiment]:
    """The experiments that have published numbers: the tables of the papers."""
    own = (load(file.stem) for file in sorted(FOLDER.glob("*.yaml")) if file.stem != CLAIMS)
    return [one for one in own if any(row.published for row in one.rows)]


def read(file: Path) -> dict[str, Any]:
    """As Hydra reads conf/: 1.86e7 is a number, where plain PyYAML takes it for text."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}

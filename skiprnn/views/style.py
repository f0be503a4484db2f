"""How figures and the page look: sizes, and one colour for each model, everywhere the same."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.colors import to_hex, to_rgb

from skiprnn.model.cells import CELLS
from skiprnn.model.policies import POLICIES
from skiprnn.training.config import ModelConfig

WIDTH, WIDE = 3.3, 6.9  # inches, a column and a page
STYLE: Any = {  # of matplotlib's rcParams
    "font.size": 7,
    "axes.titlesize": 6,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.title_fontsize": 6,
    "legend.frameon": False,
    "figure.titlesize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
}

USED, SKIPPED = "#b2182b", "#2166ac"  # the papers' red and blue, in shades that the colour-blind tell apart
BASELINE, RANDOM = "#000000", "#888888"
PALETTE = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: the colour-blind tell


def colour(policy: str) -> str:
    """Black and grey for what does not learn, the palette's next for each policy that does; a second one of a kind
    without learning has one of the palette, too."""
    colours: dict[str, str] = {}
    others = cycle(PALETTE)
    kinds = set()
    for name, kind in POLICIES.items():
        first = (kind.family, kind.draws) not in kinds
        plain = None if kind.learned or not first else RANDOM if kind.draws else BASELINE
        colours[name] = plain or next(others)
        if plain:
            kinds.add((kind.family, kind.draws))
    return colours[policy]


def shades(models: Sequence[ModelConfig]) -> list[str]:
    """A colour per row: its policy's, the paler the smaller its λ or p_skip among the rows of that policy."""
    colours = []
    for model in models:
        budgets = sorted({_budget(other) for other in models if other.policy == model.policy})
        paleness = 0.65 * (1 - budgets.index(_budget(model)) / (len(budgets) - 1)) if len(budgets) > 1 else 0.0
        red, green, blue = (part + paleness * (1 - part) for part in to_rgb(colour(model.policy)))
        colours.append(to_hex((red, green, blue)))
    return colours


def _budget(model: ModelConfig) -> float:
    return model.cost_per_sample if model.p_skip is None else model.p_skip


def name(model: ModelConfig) -> str:
    """As the papers write it: "Skip LSTM"."""
    return POLICIES[model.policy].label.format(CELLS[model.cell].label)


def budget(model: ModelConfig) -> str:
    """ "λ = 1e-4", "p = 0.5", or nothing."""
    if model.p_skip is not None:
        return f"p = {model.p_skip:g}"
    mantissa, exponent = f"{model.cost_per_sample:e}".split("e")
    short = f"{float(mantissa):g}e{int(exponent)}" if model.cost_per_sample else "0"
    return f"λ = {short}" if POLICIES[model.policy].learned else ""


def described(model: ModelConfig) -> str:
    """Both: "Skip LSTM, λ = 1e-4"."""
    return ", ".join(filter(None, (name(model), budget(model))))

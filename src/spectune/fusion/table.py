"""The table of fusion rules. A new rule is one file and one row here."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import OptionError, nearest
from .aligned_ties import AlignedTies
from .average import Average
from .calibrated import Calibrated
from .contract import Fusion
from .core import Core
from .gradient import Gradient
from .isotropic import Isotropic
from .match import Match, Sequential
from .orthogonal import Orthogonal
from .spectral import Spectral
from .task_singular import TaskSingular

FUSIONS: dict[str, type[Fusion]] = {
    rule.name: rule
    for rule in (
        Spectral,
        Average,
        TaskSingular,
        Isotropic,
        Core,
        AlignedTies,
        Calibrated,
        Gradient,
        Sequential,
        Match,
        Orthogonal,
    )
}


def build_fusion(name: str, options: Mapping[str, object]) -> Fusion:
    """Get the rule called `name` with its options; `OptionError` for an option that it does not use."""
    if name not in FUSIONS:
        raise OptionError(f"unknown rule {name!r}. {nearest(name, list(FUSIONS))}")
    known = FUSIONS[name].options()
    for option, value in options.items():
        if option not in known:
            uses = f"it has: {', '.join(known)}" if known else "it has none"
            raise OptionError(f"rule {name!r} has no option {option!r} (given: {value!r}). Leave it out; {uses}.")
    return FUSIONS[name](**options)

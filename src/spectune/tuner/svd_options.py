"""`SVDOptions`: how a config has the singular basis computed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..adapter.saved import refuse_absurd
from ..errors import OptionError, nearest


@dataclass
class SVDOptions:
    """How the singular basis is found; the arguments of `spectune.decompose`."""

    solver: str = field(default="auto", metadata={"help": "auto, exact, gram or randomized."})
    tolerance: float = field(
        default=1e-4, metadata={"help": "Largest angle to the true singular subspace, in radians."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the randomized solver and of random columns."})
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of bases to read and to fill, or 'off'. None: read what `spectune decompose` has stored."
        },
    )
    share: bool = field(
        default=True, metadata={"help": "Share the work over the processes of a distributed run; all must attach."}
    )


def svd_options_of(given: dict[str, Any]) -> SVDOptions:
    """Get the options out of a map; `OptionError` for an unknown one."""
    known = [f.name for f in fields(SVDOptions)]
    for name in given:
        if name not in known:
            raise OptionError(f"svd has no option {name!r}. {nearest(name, known)}")
    refuse_absurd(given)
    return SVDOptions(**given)

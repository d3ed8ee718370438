"""The sum of updates whose down matrices are rows of one orthogonal matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from ..errors import AdapterError
from .contract import Fusion, Part, of_factors, stacked

# Rows of one orthogonal matrix, stored in float32, are orthogonal to about 1e-7; those of two random matrices
# of width I overlap by about 1/sqrt(I) > 0.005 for every width in use. In between, chosen.
MOST_OVERLAP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Fusion):
    """Add up updates of `orthogonal_adaptation` after checking that their rows are disjoint.

    dW = sum_i weight_i B_i A_i with A_i A_j^T = 0: an input along the rows of one concept does not reach another's.
    Rows are disjoint when the adapters share `basis_seed` and r and each has its own `concept` (`spectune schedule`).

    Orthogonal Adaptation (Po et al., arXiv 2312.02432).
    """

    name: ClassVar[str] = "orthogonal"
    paper: ClassVar[str] = "Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv 2312.02432"

    allow_overlap: bool = False
    """Go on if rows are shared or come from different matrices; the updates are then simply added."""

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        for part in parts:
            if part.method is None or part.method.name != "orthogonal_adaptation":
                found = "a LoRA" if part.method is None else part.method.name
                raise AdapterError(
                    f"{part.layer}: rule 'orthogonal' only takes orthogonal_adaptation adapters, but {part.adapter} is "
                    f"{found}. Use rule='average'."
                )
        for first, second in combinations(parts, 2):
            if not self.allow_overlap:
                _refuse_shared_rows(first, second)
        return of_factors(parts, *stacked(parts, weights))

    def is_linear(self) -> bool:
        return True


def _refuse_shared_rows(first: Part, second: Part) -> None:
    overlap = float((first.delta.right_QI @ second.delta.right_QI.mT).abs().max())
    if overlap > MOST_OVERLAP:
        rows = " and ".join(f"{part.adapter} has {_rows(part)}" for part in (first, second))
        raise AdapterError(
            f"{first.layer}: the rows of two adapters are not orthogonal (overlap {overlap:.2g}): {rows}. Train them "
            "with the same basis_seed and r and a different concept each (spectune schedule), or pass --allow-overlap."
        )


def _rows(part: Part) -> str:
    options = vars(part.method)
    start = options["concept"] * options["r"]
    return f"rows {start} to {start + options['r'] - 1} of basis_seed {options['basis_seed']}"

"""The weighted sum of updates: federated averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .contract import Fusion, Part, of_factors, stacked


@dataclass(frozen=True, kw_only=True)
class Average(Fusion):
    """Add up the weighted updates, of any method, rank or columns.

    dW = sum_i weight_i dW_i, by stacking factors: B = [w_1 B_1, w_2 B_2, ...], A = [A_1; A_2; ...]. There are no
    cross terms (A_i never meets B_j), but at the default weight 1/N each adapter keeps about 1/N of its strength.

    FedAvg (McMahan et al., arXiv 1602.05629), as the Spectral Adapter's comparison uses it.
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = "Communication-Efficient Learning of Deep Networks (FedAvg), arXiv 1602.05629"

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        return of_factors(parts, *stacked(parts, weights))

    def is_linear(self) -> bool:
        return True

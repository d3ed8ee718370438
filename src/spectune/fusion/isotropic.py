"""The sum of updates with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..thin_svd import thin_svd
from .contract import Fusion, Part
from .core import COMMON, check_share, core_space, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Isotropic(Fusion):
    """Give every direction of the sum the same strength, so that none drowns the others.

    M = sum_i w_i M_i = U S V^T in the updates' common bases;   dW = mean(S) U V^T

    `common` below 1 keeps only that share of the directions of the sum, and fills the rest with each update's own
    strongest directions outside of them; both sides are then made orthonormal with the least change, and all get the
    mean of their singular values (Iso-CTS, .8 in its paper). A single adapter stays as it is. Needs no data, takes
    weights of 1; the rank of the result is at most the sum of the ranks. In the paper the mean is over the whole
    width of the weight; here it is over the dimensions that the updates span.

    Iso-C and Iso-CTS (Marczak et al., arXiv 2502.04959).
    """

    name: ClassVar[str] = "isotropic"
    paper: ClassVar[str] = "No Task Left Behind: Isotropic Model Merging, arXiv 2502.04959"
    whole_weights: ClassVar[bool] = True

    common: float = 1.0
    """The share of directions that are those of the sum; 1 is Iso-C."""

    def __post_init__(self) -> None:
        check_share("common", self.common)

    def is_linear(self) -> bool:
        return True

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        space = core_space(parts)
        total_PQ = weighted_sum(space.cores_NPQ, weights)
        if len(parts) == 1 or not bool(total_PQ.any()):
            return space.part(total_PQ, parts)
        U_PK, S_K, Vh_KQ = thin_svd(total_PQ)
        own = int((1 - self.common) * len(S_K)) // len(parts)
        shared = len(S_K) - own * len(parts)
        lefts, values, rights = [U_PK[:, :shared]], [S_K[:shared]], [Vh_KQ[:shared]]
        if own:
            for core_PQ, weight in zip(space.cores_NPQ, weights, strict=True):
                rest_PQ = weight * (core_PQ - lefts[0] @ (lefts[0].mT @ core_PQ))
                X_PK, T_K, Yh_KQ = thin_svd(rest_PQ)
                k = min(own, int((COMMON * S_K[0] < T_K).sum()))
                lefts, values, rights = [*lefts, X_PK[:, :k]], [*values, T_K[:k]], [*rights, Yh_KQ[:k]]
        flat_PQ = _polar(torch.cat(lefts, dim=1)) @ _polar(torch.cat(rights))
        return space.part(torch.cat(values).mean() * flat_PQ, parts)


def _polar(stacked_AK: torch.Tensor) -> torch.Tensor:
    U_AK, _, Vh_KK = thin_svd(stacked_AK)
    return U_AK @ Vh_KK

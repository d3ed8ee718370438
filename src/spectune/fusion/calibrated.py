"""The sum of updates, weaker where several have pushed the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..thin_svd import thin_svd
from .contract import Fusion, Part
from .core import COMMON, core_space, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Calibrated(Fusion):
    """Add up, then shrink the singular values that are larger than the updates behind them.

    M = sum_i w_i M_i = U S V^T;   a_ik = w_i u_k^T M_i,   s_ik = <s_k v_k, a_ik> / |a_ik|^2
    dW = U diag(g S) V^T,   g_k = N / sum_i max(1, s_ik)

    s_ik says how many times what adapter i does along u_k the sum does there. What one adapter alone does stays
    (s = 1), what all do alike is divided by N; an adapter that does nothing along u_k counts as 1. A copy of an adapter
    beside it gives the adapter again. Needs no data, takes weights of 1; the rank of the result is at most the sum of
    the ranks.

    SVC (Li et al., arXiv 2602.05536), with their floor on s at 1, so that nothing grows.
    """

    name: ClassVar[str] = "calibrated"
    paper: ClassVar[str] = "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, arXiv 2602.05536"
    whole_weights: ClassVar[bool] = True

    def is_linear(self) -> bool:
        return True

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        space = core_space(parts)
        U_PK, S_K, Vh_KQ = thin_svd(weighted_sum(space.cores_NPQ, weights))
        inflated_K = torch.zeros_like(S_K)
        for core_PQ, weight in zip(space.cores_NPQ, weights, strict=True):
            own_KQ = weight * (U_PK.mT @ core_PQ)
            sizes_K = own_KQ.square().sum(1)
            times_K = S_K * (own_KQ * Vh_KQ).sum(1) / sizes_K
            inflated_K += torch.where(sizes_K.sqrt() > COMMON * S_K, times_K, 1.0).clamp(min=1)
        return space.part((U_PK * (S_K * len(parts) / inflated_K)) @ Vh_KQ, parts)

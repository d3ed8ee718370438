"""The sum of updates whose singular vectors have first been made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .compact import in_order
from .contract import Fusion, Part, of_compact, of_factors

# An eigenvalue of the Gram matrix below this share of the largest is that of directions which several updates have in
# common to the last bits of float64 (the square root of its roundoff).
COMMON = 1e-8


@dataclass(frozen=True, kw_only=True)
class TaskSingular(Fusion):
    """Stack the singular vectors of all updates, make each side orthonormal with the least change, and add up.

    dW_i = U_i S_i V_i^T;   dW = P(U) diag(w_1 S_1, ..., w_N S_N) P(V)^T,   U = [U_1 ... U_N], V = [V_1 ... V_N]

    P(U) = U (U^T U)^(-1/2), the nearest matrix with orthonormal columns. Where the updates share so few dimensions that
    the stack cannot be orthonormal (adapters with one frozen basis), each is first cut to its floor(dimensions / N)
    strongest directions. Needs no data and takes weights of 1; the rank of the result is the sum of the ranks. A copy
    of an adapter beside it is cut, and is not the adapter again.

    TSV-Merge (Gargiulo et al., arXiv 2412.00081), section 4: they cut every task to 1/N of the weight's rank.
    """

    name: ClassVar[str] = "task_singular"
    paper: ClassVar[str] = "Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081"
    whole_weights: ClassVar[bool] = True

    def is_linear(self) -> bool:
        return True

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        found = [part.compact for part in parts]
        kept = [len(one.S_P) for one in found]
        left, right = _side([one.X_OP for one in found]), _side([one.Yh_PI.mT for one in found])
        room = min(len(left.values_P), len(right.values_P))
        if sum(kept) > room:
            kept = [min(room // len(parts) or 1, k) for k in kept]
            left = _side([one.X_OP[:, :k] for one, k in zip(found, kept, strict=True)])
            right = _side([one.Yh_PI[:k].mT for one, k in zip(found, kept, strict=True)])
        strengths_P = torch.cat([w * one.S_P[:k] for one, w, k in zip(found, weights, kept, strict=True)])
        X_OP, Yh_PI = left.orthonormal(), right.orthonormal().mT
        if len(left.values_P) == len(right.values_P) == len(strengths_P):
            return of_compact(parts, in_order(X_OP, strengths_P, Yh_PI))
        return of_factors(parts, X_OP * strengths_P, Yh_PI)  # more updates than dimensions


@dataclass(frozen=True, eq=False)
class _Side:
    """Stacked singular vectors, and the eigenvalues of their Gram matrix that are not roundoff."""

    stacked_AP: torch.Tensor
    values_P: torch.Tensor
    vectors_PP: torch.Tensor

    def orthonormal(self) -> torch.Tensor:
        """Get the nearest matrix with orthonormal columns."""
        return self.stacked_AP @ ((self.vectors_PP * self.values_P.rsqrt()) @ self.vectors_PP.mT)


def _side(vectors: Sequence[torch.Tensor]) -> _Side:
    stacked_AP = torch.cat(list(vectors), dim=1)
    values_P, vectors_PP = torch.linalg.eigh(stacked_AP.mT @ stacked_AP)
    apart = values_P > COMMON * values_P[-1] if len(values_P) else values_P > 0
    return _Side(stacked_AP, values_P[apart], vectors_PP[:, apart])

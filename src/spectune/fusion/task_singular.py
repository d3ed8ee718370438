"""The sum of updates whose singular vectors have first been made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .contract import Fusion, Part, of_factors
from .overlap import compact

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
        found = [compact(part.delta) for part in parts]
        lefts, rights = [one.X_OP for one in found], [one.Yh_PI.mT for one in found]
        kept = [len(one.S_P) for one in found]
        room = min(_dimensions(lefts), _dimensions(rights))
        if sum(kept) > room:
            kept = [min(room // len(parts) or 1, k) for k in kept]
        left_OP, right_IP = (
            _orthonormal(torch.cat([side[:, :k] for side, k in zip(sides, kept, strict=True)], dim=1))
            for sides in (lefts, rights)
        )
        strengths = [weight * one.S_P[:k] for one, weight, k in zip(found, weights, kept, strict=True)]
        return of_factors(parts, left_OP * torch.cat(strengths), right_IP.mT)


def _gram(stacked_AP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the eigenvalues of the Gram matrix that are not roundoff, and their eigenvectors."""
    values_P, vectors_PP = torch.linalg.eigh(stacked_AP.mT @ stacked_AP)
    apart = values_P > COMMON * values_P[-1] if len(values_P) else values_P > 0
    return values_P[apart], vectors_PP[:, apart]


def _dimensions(sides: Sequence[torch.Tensor]) -> int:
    return len(_gram(torch.cat(list(sides), dim=1))[0])


def _orthonormal(stacked_AP: torch.Tensor) -> torch.Tensor:
    values_p, vectors_Pp = _gram(stacked_AP)
    return stacked_AP @ (vectors_Pp * values_p.rsqrt()) @ vectors_Pp.mT

"""The small space in which several updates meet, and TIES inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import OptionError
from ..thin_svd import thin_svd
from .compact import in_order
from .contract import Fusion, Part, of_compact

# Singular values of the stack below this share of the largest are roundoff: directions that several updates have in
# common to the last bits of float64.
COMMON = 1e-10
# Of TIES' paper, section 4: the share of the numbers that stays.
DENSITY = 0.2


@dataclass(frozen=True, eq=False)
class Cores:
    """Updates in common bases: dW_i = Q_OP M_i Qh_QI, with orthonormal columns of Q and rows of Qh; nothing is lost."""

    Q_OP: torch.Tensor
    cores_NPQ: torch.Tensor
    Qh_QI: torch.Tensor

    def part(self, core_PQ: torch.Tensor, parts: Sequence[Part]) -> Part:
        """Get the fused part of a layer with the update Q M Qh."""
        U_PK, S_K, Vh_KQ = thin_svd(core_PQ)
        return of_compact(parts, in_order(self.Q_OP @ U_PK, S_K, Vh_KQ @ self.Qh_QI))


def core_space(parts: Sequence[Part]) -> Cores:
    """Get the updates of one layer in the bases of all their outputs and of all their inputs.

    The bases are the singular vectors of the stacked factors X_i S_i^(1/2) and S_i^(1/2) Y_i of every update's own
    singular value decomposition X_i S_i Y_i, so that they do not depend on how an adapter splits its update.
    """
    found = [part.compact for part in parts]
    lefts = [one.X_OP * one.S_P.sqrt() for one in found]
    rights = [one.S_P.sqrt()[:, None] * one.Yh_PI for one in found]
    Q_OP, Qh_QI = _span(torch.cat(lefts, dim=1)), _span(torch.cat(rights).mT).mT
    cores = [(Q_OP.mT @ left) @ (right @ Qh_QI.mT) for left, right in zip(lefts, rights, strict=True)]
    return Cores(Q_OP, torch.stack(cores), Qh_QI)


def _span(stacked_AP: torch.Tensor) -> torch.Tensor:
    U_AP, S_P, _ = thin_svd(stacked_AP)
    return U_AP[:, COMMON * S_P.max() < S_P] if S_P.numel() else U_AP


@dataclass(frozen=True, kw_only=True)
class Core(Fusion):
    """Resolve the conflicts of sign in the common bases of all updates, where they are small dense matrices.

    dW_i = Q M_i Qh;   dW = Q TIES(w_1 M_1, ..., w_N M_N) Qh

    TIES keeps the `density` largest numbers of each M_i, lets them vote on a sign at every place (by their sum), and
    takes the mean of those that agree with it. A single adapter has no conflicts and stays as it is; a copy beside it
    does not change what is left of it. Needs no data, takes weights of 1; the rank of the result is at most the sum
    of the ranks. Rules that do not look at single numbers (average, task_singular, isotropic, calibrated) give the
    same inside the common bases as outside.

    Core Space (Panariello et al., arXiv 2509.17786) with TIES-Merging (Yadav et al., arXiv 2306.01708).
    """

    name: ClassVar[str] = "core"
    paper: ClassVar[str] = "Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786"
    whole_weights: ClassVar[bool] = True

    density: float = DENSITY
    """The share of each update's numbers that stays, 0 to 1."""

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def is_linear(self) -> bool:
        return True

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        space = core_space(parts)
        return space.part(elect(space.cores_NPQ, weights, self.density), parts)


def elect(stacked_NAB: torch.Tensor, weights: Sequence[float], density: float) -> torch.Tensor:
    """Get TIES of the weighted matrices: keep the largest numbers, elect a sign at each place, average who has it."""
    weighted_NK = (stacked_NAB * _column(weights, stacked_NAB)).flatten(1)
    if len(weighted_NK) == 1 or not weighted_NK.numel():
        return weighted_NK.sum(0).view(stacked_NAB.shape[1:])
    dropped = weighted_NK.shape[1] - max(1, round(density * weighted_NK.shape[1]))
    if dropped:
        least_N1 = weighted_NK.abs().kthvalue(dropped, dim=1, keepdim=True).values
        weighted_NK = torch.where(weighted_NK.abs() > least_N1, weighted_NK, 0)
    agree_NK = (weighted_NK.sign() == weighted_NK.sum(0).sign()) & (weighted_NK != 0)
    merged_K = (weighted_NK * agree_NK).sum(0) / agree_NK.sum(0).clamp(min=1)
    return merged_K.view(stacked_NAB.shape[1:])


def check_share(name: str, value: float) -> None:
    """Raise `OptionError` for a share that is not above 0 and at most 1."""
    if not 0 < value <= 1:
        raise OptionError(f"{name}={value} must be a share above 0 and at most 1.")


def weighted_sum(cores_NPQ: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Get sum_i w_i M_i."""
    return (cores_NPQ * _column(weights, cores_NPQ)).sum(0)


def _column(weights: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(weights, dtype=like.dtype, device=like.device)[:, None, None]

"""The small problem of block Krylov: Ritz triplets, and the error bounds that they give for the wanted directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..thin_svd import thin_svd
from .exact import DIVIDE_ABOVE

# A residual of this many units of roundoff (times S[0]) cannot be lowered. Measured on 2048 x 2048.
ROUNDOFF_UNITS = 8.0


@dataclass(frozen=True, eq=False)
class Ritz:
    """The singular triplets of one M_kk, and |W^T u - s v| of each; all float64 on the CPU."""

    values_k: torch.Tensor
    Yh_kk: torch.Tensor
    residuals_k: torch.Tensor
    count: int
    """How many leading triplets are wanted."""
    whole: bool
    """The bases span everything: the Ritz values are the singular values."""
    X_kk: torch.Tensor | None = None
    """The left vectors, where M was decomposed by an SVD and not by the eigenvectors of M^T M."""

    def is_roundoff(self, eps: float) -> bool:
        """Ask whether the residual of the leading directions has reached roundoff."""
        enough = self.whole or len(self.values_k) > self.count
        residual = float(torch.linalg.vector_norm(self.residuals_k[: self.count]))
        return enough and residual <= ROUNDOFF_UNITS * eps * float(self.values_k[0])

    def angle_bound(self) -> float:
        """Get a bound on the angle between the leading Ritz directions and the true ones, to first order.

        With E the residuals, s the Ritz values, c = s[m] + E[m] and i < count <= j < m:
            sqrt(sum_i (E_i s_i / (s_i^2 - c^2))^2) (1 + sqrt(sum_j (E_j / (s[count-1] - s_j))^2)),
        the least over m >= count. A Krylov residual is orthogonal to all Ritz directions, so only what lies
        beyond the m-th can turn the leading ones; column i of that turn solves (s_i^2 - C^T C) x = s_i E_i with
        |C| <= c (W v - s u is zero here, which gives the squares). The second factor is the way round through
        the directions between. m = count without it is Wedin's bound.
        """
        s_k, E_k, count = self.values_k, self.residuals_k, self.count
        if len(s_k) <= count:
            return 0.0 if self.whole else math.inf
        last = float(s_k[count - 1])
        if not last > float(s_k[count]) or not bool(torch.isfinite(E_k[:count]).all()):
            return math.inf
        beyond_m = s_k[count:] + E_k[count:]
        s_i1, E_i1 = s_k[:count, None], E_k[:count, None]
        turned_m = (E_i1 * s_i1 / (s_i1.square() - beyond_m.square())).square().sum(0).sqrt()
        between_m = (E_k[count:] / (last - s_k[count:])).square().cumsum(0).sqrt()
        between_m = torch.cat([between_m.new_zeros(1), between_m[:-1]])
        bounds_m = torch.where(beyond_m < last, turned_m * (1 + between_m), torch.inf)
        return float(bounds_m.min())

    def triplets(self, M_kk: torch.Tensor, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (left_Rk, right_Rk), the chosen Ritz vectors as rows of coefficients."""
        right_Rk = self.Yh_kk[places]
        if self.X_kk is not None:
            return self.X_kk.mT[places], right_Rk
        return right_Rk @ M_kk.mT / self.values_k[places, None], right_Rk


def solve_small(
    M_Bkk: torch.Tensor, rest_Bbb: torch.Tensor | None, count: int, whole: bool, *, exactly: bool
) -> list[Ritz]:
    """Get the Ritz triplets of every M_kk of a batch; `rest_Bbb` is what the next block adds, None if unknown.

    The eigenvectors of M^T M cost half of an SVD and lose nothing that float32 could show while the wanted
    values are above DIVIDE_ABOVE of the largest; else, and if `exactly`, the SVD is taken.
    """
    found = []
    squares_Bk, Y_Bkk = (None, None) if exactly else torch.linalg.eigh(M_Bkk.mT @ M_Bkk)
    for place, M_kk in enumerate(M_Bkk):
        rest_bb = None if rest_Bbb is None else rest_Bbb[place]
        if squares_Bk is not None and Y_Bkk is not None:
            values_k = squares_Bk[place].flip(0).clamp_min(0).sqrt()
            if count <= len(values_k) and values_k[count - 1] > DIVIDE_ABOVE * values_k[0]:
                Yh_kk = Y_Bkk[place].mT.flip(0)
                found.append(_ritz(M_kk, values_k, Yh_kk, None, rest_bb, count, whole))
                continue
        X_kk, values_k, Yh_kk = thin_svd(M_kk)
        found.append(_ritz(M_kk, values_k, Yh_kk, X_kk, rest_bb, count, whole))
    return found


def _ritz(
    M_kk: torch.Tensor,
    values_k: torch.Tensor,
    Yh_kk: torch.Tensor,
    X_kk: torch.Tensor | None,
    rest_bb: torch.Tensor | None,
    count: int,
    whole: bool,
) -> Ritz:
    if whole:
        residuals_k = torch.zeros_like(values_k)
    elif rest_bb is None:
        residuals_k = torch.full_like(values_k, math.inf)
    else:
        b = len(rest_bb)
        # Weak values would divide noise; their residuals are only looked at beyond the wanted ones.
        floor = DIVIDE_ABOVE**2 * values_k[0]
        last_bk = X_kk[-b:] if X_kk is not None else M_kk[-b:] @ Yh_kk.mT / values_k.clamp_min(floor)
        residuals_k = torch.linalg.vector_norm(rest_bb.mT @ last_bk, dim=0)
    return Ritz(values_k, Yh_kk, residuals_k, count, whole, X_kk)

"""`Compact`: the singular value decomposition of an update, without building the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algebra import to_factors
from ..records import Delta
from ..thin_svd import thin_svd


@dataclass(frozen=True, eq=False)
class Compact:
    """The singular value decomposition of an update: X_OP diag(S_P) Yh_PI, P its rank."""

    X_OP: torch.Tensor
    S_P: torch.Tensor
    Yh_PI: torch.Tensor

    @property
    def size(self) -> float:
        """|dW|_F."""
        return float(torch.linalg.vector_norm(self.S_P))

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Get (B_OP, A_PI) of its best approximation of this rank, and |dW - B A|_F as a share of |dW|_F."""
        root_P = self.S_P[:rank].sqrt()
        lost = float(torch.linalg.vector_norm(self.S_P[rank:])) / (self.size or 1.0)
        return self.X_OP[:, :rank] * root_P, root_P[:, None] * self.Yh_PI[:rank], lost


def compact(delta: Delta) -> Compact:
    """Get the singular value decomposition of an update without building it; roundoff directions are left out."""
    B_OP, A_PI = to_factors(delta)
    left_OP, R_left = torch.linalg.qr(B_OP)
    right_IP, R_right = torch.linalg.qr(A_PI.mT)
    X_PP, S_P, Yh_PP = thin_svd(R_left @ R_right.mT)  # not square if wider than one side
    kept = _apart(S_P, delta.shape)
    return Compact(left_OP @ X_PP[:, kept], S_P[kept], Yh_PP[kept] @ right_IP.mT)


def in_order(X_OP: torch.Tensor, S_P: torch.Tensor, Yh_PI: torch.Tensor) -> Compact:
    """Get X diag(S) Yh, X and Yh orthonormal and S of any sign and order, as a singular value decomposition."""
    sizes_P, order_P = S_P.abs().sort(descending=True)
    order_P = order_P[_apart(sizes_P, (len(X_OP), Yh_PI.shape[1]))]
    return Compact(X_OP[:, order_P] * S_P[order_P].sign(), S_P[order_P].abs(), Yh_PI[order_P])


def _apart(S_P: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Ask which falling singular values are above roundoff."""
    return (S_P > 0) & (max(shape) * torch.finfo(S_P.dtype).eps * S_P[:1] < S_P)


def inner(one: Compact, other: Compact) -> float:
    """Get <dW_1, dW_2> = sum of the products of their entries."""
    outputs_Pp = one.X_OP.mT @ other.X_OP
    inputs_Pp = one.Yh_PI @ other.Yh_PI.mT
    return float((one.S_P[:, None] * outputs_Pp * inputs_Pp * other.S_P).sum())

"""The numbers of a `spectral_a` adapter that come as close to a tuned weight as its form allows."""

from __future__ import annotations

import torch

from ..algebra import truncate
from ..records import Spectrum, Weight
from ..spectrum import decompose
from ..thin_svd import thin_svd

# Of the singular subspace of the target, in radians. dW may be a thousandth of the target, so its default of 1e-4
# would show; the loss is the square of the angle. Chosen, not measured.
ANGLE = 1e-6


def fit_spectral_a(dW: Weight, spectrum: Spectrum) -> tuple[torch.Tensor, torch.Tensor]:
    """Get (A_U_OR, A_Vh_RI), float32, for which the adapter's update is as close to dW as its form allows.

        W + dW ~ (U + A_U) diag(S) (Vh + A_Vh) + (W - U diag(S) Vh)

    The first product can be any O x I matrix of rank R (S > 0), so the best one is the rank-R truncated SVD of
    T_OI = dW + U diag(S) Vh (Eckart-Young): T ~ X_OR Yh_RI, the singular values shared evenly. The remainder is
    |T - X Yh|_F <= |dW|_F, and zero if dW came from spectral_a on these directions.

    X Yh = (X Z)(Z^T Yh) leaves the split open. Z is the orthogonal R x R matrix that brings X Z nearest to
    U diag(S)^1/2 and Z^T Yh nearest to diag(S)^1/2 Vh (Procrustes: the polar factor of the sum of both overlaps), and

        A_U = X Z diag(S)^-1/2 - U,   A_Vh = diag(S)^-1/2 Z^T Yh - Vh.

    They are zero for dW = 0, and of all such rotations have the least |A_U diag(S)^1/2|^2 + |diag(S)^1/2 A_Vh|^2. The
    least |A_U|^2 + |A_Vh|^2 over every invertible Z has no closed form; on 12 weights of a fully fine-tuned MiniLM this
    |A| was at most 0.6% above it, found by L-BFGS (r = 8, and r = 32 with dW twenty times as large).
    Computed in float64: dW is a small difference of large weights.
    """
    U_OR, S_R, Vh_RI = (part.double() for part in (spectrum.U_OR, spectrum.S_R, spectrum.Vh_RI))
    R = len(S_R)
    T_OI = torch.addmm(dW.W_OI.double(), U_OR * S_R, Vh_RI)
    right_RI = decompose(Weight(dW.name, T_OI), R, tolerance=ANGLE, dtype=torch.float64).Vh_RI
    X_OR, Yh_RI, _ = truncate(T_OI @ right_RI.mT, right_RI, R)
    root_R = S_R.sqrt()
    overlap_RR = X_OR.mT @ (U_OR * root_R) + Yh_RI @ (Vh_RI.mT * root_R)
    left_RR, _, right_RR = thin_svd(overlap_RR)
    Z_RR = left_RR @ right_RR
    A_U_OR = X_OR @ Z_RR / root_R - U_OR
    A_Vh_RI = (Z_RR.mT @ Yh_RI) / root_R[:, None] - Vh_RI
    return A_U_OR.float(), A_Vh_RI.float()

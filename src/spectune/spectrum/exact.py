"""The direct solvers: LAPACK's SVD, and the eigenvectors of the smaller Gram matrix."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..thin_svd import thin_svd
from .columns import Choice
from .found import Found, transposed

# U = W v / s has orthogonality error eps64 (S[0] / s)^2: 2e-8 at this ratio, below float32's own 6e-8.
# Under it, and always for float64 answers, U is taken from a QR instead. Derived.
DIVIDE_ABOVE = 1e-4
# A part of the eigenvectors is computed alone where it is at most 1 / PARTIAL_SHARE of them. Measured at K = 384 and
# 576, 17 of them: 5.9 and 14 ms against 15 and 45 ms for all.
PARTIAL_SHARE = 4


def exact(W_OI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int) -> Found:
    """Get the chosen directions from the full SVD (LAPACK's gesdd; `thin_svd` on a GPU).

    Residual and orthogonality are roundoff of the dtype; `tolerance` and `seed` are not used.
    If the solver does not converge, the work is repeated in float64.
    """
    try:
        U_OK, S_K, Vh_KI = thin_svd(W_OI)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not name it in __all__
        U_OK, S_K, Vh_KI = (part.to(W_OI.dtype) for part in thin_svd(W_OI.double()))
    places = list(choice.places)
    return Found(U_OK[:, places], S_K[places], Vh_KI[places], S_K.double().cpu(), "exact")


def gram(W_OI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int) -> Found:
    """Get the chosen directions from eigh(W^T W) (or W W^T, whichever is smaller), in float64.

    Squaring costs half the digits: singular values under 1.5e-8 S[0] are noise of that size, which is
    below float32's roundoff. U is orthonormal even for them, and for zeros, because it comes from a QR. Where few
    leading directions are wanted, only those eigenvectors are computed (on the CPU).
    """
    if W_OI.shape[0] < W_OI.shape[1]:
        return transposed(gram(W_OI.mT, choice, tolerance=tolerance, seed=seed))
    W64_OI = W_OI.double()
    few = not W_OI.is_cuda and PARTIAL_SHARE * choice.leading <= choice.K
    squares_J, V_IJ = _leading(W64_OI, choice.leading + 1) if few else torch.linalg.eigh(W64_OI.mT @ W64_OI)
    values_J = squares_J.clamp_min(0).sqrt().flip(0)
    places = list(choice.places)
    V_IR = V_IJ.flip(1)[:, places]
    U_OR, S_R = _left_of(W64_OI @ V_IR, values_J, W_OI.dtype)
    return Found(U_OR.to(W_OI.dtype), S_R.to(W_OI.dtype), V_IR.mT.to(W_OI.dtype), values_J.cpu(), "gram")


def _leading(W64_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the `count` largest eigenvalues of W^T W, ascending, and their vectors: BLAS syrk and LAPACK syevr.

    torch has neither: it multiplies both halves of a symmetric product, and computes all eigenvectors.
    """
    from scipy.linalg import blas, eigh

    I = W64_OI.shape[1]
    with _threads_of_scipy().limit(limits=1):
        # Fortran's view of a row-major W is W^T, so this is W^T W, its upper triangle alone.
        G_II = blas.dsyrk(1.0, W64_OI.contiguous().numpy().T)
        squares_J, V_IJ = eigh(
            G_II, lower=False, subset_by_index=[I - count, I - 1], driver="evr", overwrite_a=True, check_finite=False
        )
    return torch.from_numpy(squares_J), torch.from_numpy(V_IJ)


@functools.cache
def _threads_of_scipy() -> Any:
    """Get what limits scipy's own OpenBLAS: its threads and torch's, both spinning, slowed a solve to a third."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")


def _left_of(US_OR: torch.Tensor, values_J: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Get (U_OR, S_R) from W V = U diag(S), U orthonormal even where S is zero.

    The columns are nearly orthogonal already, so QR (in descending order: it may only bend a weak
    column towards the strong ones) changes nothing but what roundoff spoiled, and completes zeros.
    """
    S_R = torch.linalg.vector_norm(US_OR, dim=0)
    if dtype != torch.float64 and bool((DIVIDE_ABOVE * values_J[0] < S_R).all()):
        return US_OR / S_R, S_R
    order_R = S_R.argsort(descending=True, stable=True)
    unit_OR, triangle_RR = torch.linalg.qr(US_OR[:, order_R])
    diagonal_R = triangle_RR.diagonal()
    signs_R = torch.where(diagonal_R < 0, -1.0, 1.0).to(diagonal_R.dtype)
    back_R = order_R.argsort()
    return (unit_OR * signs_R)[:, back_R], diagonal_R.abs()[back_R]

"""`thin_svd`: torch's SVD, but on a GPU by solvers as accurate as LAPACK's."""

from __future__ import annotations

import torch

# Up to this side the square factor of a QR is solved by LAPACK on the CPU; a transfer of 8 MB costs little beside it.
# Chosen, not measured.
SMALL_SIDE = 1024

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def thin_svd(X_AB: torch.Tensor) -> Triplets:
    """Get (U_AK, S_K, Vh_KB) with X = U diag(S) Vh and K = min(A, B); of a batch, each matrix's.

    It is `torch.linalg.svd(X, full_matrices=False)`, except on CUDA, where torch takes cuSOLVER's Jacobi solver, whose
    values were 4e-5 S[0] off in float32 (400 x 300 on an H200; benchmarks/results/gpu.json). There a QR reduces X to
    its smaller side, and that square is solved by LAPACK on the CPU, or by cuSOLVER's gesvd if it is over 1,024 wide.
    Raises `torch.linalg.LinAlgError` if the solver does not converge.
    """
    return reduced_svd(X_AB) if X_AB.is_cuda else torch.linalg.svd(X_AB, full_matrices=False)


def reduced_svd(X_AB: torch.Tensor) -> Triplets:
    """Get what `thin_svd` gives, by way of a QR."""
    if X_AB.shape[-2] < X_AB.shape[-1]:
        U_BK, S_K, Vh_KA = reduced_svd(X_AB.mT)
        return Vh_KA.mT, S_K, U_BK.mT
    Q_AK, R_KK = torch.linalg.qr(X_AB)
    if R_KK.shape[-1] > SMALL_SIDE and R_KK.is_cuda:
        X_KK, S_K, Vh_KK = torch.linalg.svd(R_KK, full_matrices=False, driver="gesvd")
    else:
        X_KK, S_K, Vh_KK = (part.to(X_AB.device) for part in torch.linalg.svd(R_KK.cpu(), full_matrices=False))
    return Q_AK @ X_KK, S_K, Vh_KK

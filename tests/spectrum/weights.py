"""Weights with a known spectrum, and the oracle: torch.linalg.svd in float64."""

from __future__ import annotations

import torch

from spectune.records import Spectrum


def with_values(O: int, I: int, S_K: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Get a float32 weight with these singular values and random directions."""
    random = torch.Generator().manual_seed(seed)
    K = len(S_K)
    U_OK, V_IK = (torch.linalg.qr(torch.randn(side, K, generator=random, dtype=torch.float64)).Q for side in (O, I))
    return ((U_OK * S_K) @ V_IK.mT).float()


def power_law(O: int, I: int, exponent: float = 0.7, seed: int = 0) -> torch.Tensor:
    return with_values(O, I, torch.arange(1, min(O, I) + 1, dtype=torch.float64) ** -exponent, seed)


def largest_angle(W_OI: torch.Tensor, spectrum: Spectrum) -> float:
    """Get the sine of the largest angle between the found subspaces and the oracle's."""
    U_OK, _, Vh_KI = torch.linalg.svd(W_OI.double(), full_matrices=False)
    places = list(spectrum.columns)
    angles = []
    for true_NR, found_NR in (
        (U_OK[:, places], spectrum.U_OR.double()),
        (Vh_KI[places].mT, spectrum.Vh_RI.double().mT),
    ):
        found_NR = torch.linalg.qr(found_NR).Q
        angles.append(torch.linalg.matrix_norm(found_NR - true_NR @ (true_NR.mT @ found_NR), 2))
    return float(max(angles))


def worst_value(W_OI: torch.Tensor, spectrum: Spectrum) -> float:
    """Get the largest error of a singular value, as a fraction of the largest one."""
    S_K = torch.linalg.svdvals(W_OI.double())
    error = (spectrum.S_R.double() - S_K[list(spectrum.columns)]).abs().max()
    return float(error / S_K[0]) if S_K[0] > 0 else float(error)

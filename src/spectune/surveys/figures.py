"""The figures that a survey computes from singular values: effective rank, stable rank, energy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import WeightError

# Rows of W converted to float64 at a time, so that no float64 copy of a whole weight is made. Chosen.
BLOCK = 1024


def weight_singular_values(W_OI: torch.Tensor, name: str = "weight") -> list[float]:
    """Get all K singular values of a weight, descending: square roots of the eigenvalues of its smaller Gram matrix.

    In float64, so the error is about 1e-13 of the largest value near the top and values under 1.5e-8 of it (the
    root of float64's roundoff) are noise. Measured on Gaussian weights up to 2048 x 2048: closer to float64's SVD than
    the SVD in float32 is, and no slower. `WeightError` for NaN, infinity, an empty weight or one of integers.
    """
    if W_OI.ndim != 2 or W_OI.numel() == 0 or not W_OI.dtype.is_floating_point:
        shape = "x".join(map(str, W_OI.shape))
        raise WeightError(
            f"{name}: a floating-point matrix is needed, but this is {shape or 'a scalar'} of {W_OI.dtype}. Exclude it."
        )
    W_AK = W_OI if W_OI.shape[0] >= W_OI.shape[1] else W_OI.T
    gram_KK = torch.zeros(W_AK.shape[1], W_AK.shape[1], dtype=torch.float64)
    for block_bK in W_AK.split(BLOCK):
        wide_bK = block_bK.double()
        gram_KK.addmm_(wide_bK.T, wide_bK)
    if not bool(torch.isfinite(gram_KK).all()):
        raise WeightError(f"{name}: the weight contains NaN or infinity. Repair or exclude it.")
    values: list[float] = torch.linalg.eigvalsh(gram_KK).clamp_min(0).sqrt().flip(0).tolist()
    return values


def frobenius(values: Sequence[float]) -> float:
    """Get the Frobenius norm of the matrix with these singular values."""
    return math.sqrt(sum(value * value for value in values))


def effective_rank(values: Sequence[float]) -> float:
    """Get exp(H(p)), p_i = s_i / sum(s), H the Shannon entropy in nats: from 1 to K; 0 for a zero matrix.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), definition 1.
    """
    total = sum(values)
    shares = [value / total for value in values if value > 0] if total else []
    return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def stable_rank(values: Sequence[float]) -> float:
    """Get |W|_F^2 / |W|_2^2, from 1 to the rank; 0 for a zero matrix. Rudelson & Vershynin (arXiv math/0503442)."""
    return (frobenius(values) / values[0]) ** 2 if values and values[0] else 0.0


def energy_at(values: Sequence[float], r: int) -> float:
    """Get the share of |W|_F^2 in the r largest singular values; 0 for a zero matrix."""
    total = sum(value * value for value in values)
    return sum(value * value for value in values[:r]) / total if total else 0.0


def rank_for_energy(values: Sequence[float], share: float) -> int:
    """Get the smallest r with `energy_at(values, r) >= share`; 0 for a zero matrix."""
    wanted, found = share * sum(value * value for value in values), 0.0
    if not wanted:
        return 0
    for r, value in enumerate(values, 1):
        found += value * value
        # Sums of the same squares in another grouping may differ in the last digit.
        if found >= wanted * (1 - 1e-12):
            return r
    return len(values)


def median(values: Sequence[float]) -> float:
    """Get the middle value; the mean of the two middle ones for an even count. NaN for none."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

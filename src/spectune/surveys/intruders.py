"""How an update lies in the singular space of its base weight: overlaps, and intruder dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algebra import dense, to_factors
from ..records import Delta, Spectrum, Weight
from ..spectrum import decompose

# k and epsilon of algorithm 1 of Shuttleworth et al. (arXiv 2410.21228), with the values that PEFT's
# reduce_intruder_dimension takes by default.
INTRUDER_K = 10
INTRUDER_EPSILON = 0.5


@dataclass(frozen=True)
class Overlap:
    """Shares of |dW|_F^2 inside spaces of the base weight, and the shares of a random update."""

    left_top: float
    """|U_top^T dW|_F^2 / |dW|_F^2: the part that writes into the base's r strongest output directions."""
    left_bottom: float
    right_top: float
    """|dW Vh_top^T|_F^2 / |dW|_F^2: the part that reads from the base's r strongest input directions."""
    right_bottom: float
    left_chance: float
    """r / O: the mean share of a direction drawn at random among all outputs."""
    right_chance: float
    """r / I."""


@dataclass(frozen=True)
class Intruders:
    """The top k left singular vectors of W + dW that no single singular vector of W resembles."""

    count: int
    looked_at: int
    """k, or fewer if the weight has fewer directions."""
    least_cosine: float
    """The smallest of the k largest cosines; below epsilon it belongs to an intruder."""
    outside: int
    """How many of the intruders also have |U_k^T u| < epsilon: new directions, not only a rotation of the base's top
    k among themselves (which the definition counts, and which spectral_r does by design)."""


def overlap(delta: Delta, spectrum: Spectrum, r: int) -> Overlap:
    """Get where an update lies among the base's top r and bottom r directions; never builds dW.

    With the QR factorisation A^T = E R, dW = B A = (B R^T) E^T, so |U^T dW|_F = |U^T B R^T|_F. Where K < r, top and
    bottom are both all K directions. Zeros for an update of zero.
    """
    B_OP, A_PI = to_factors(delta)
    R_right = torch.linalg.qr(A_PI.T, mode="r").R
    R_left = torch.linalg.qr(B_OP, mode="r").R
    left_K = (spectrum.U_OR.mT @ (B_OP @ R_right.mT)).square().sum(dim=1)
    right_K = (spectrum.Vh_RI @ (A_PI.mT @ R_left.mT)).square().sum(dim=1)
    total = float((R_left @ R_right.mT).square().sum()) or 1.0
    rows_O, cols_I = delta.shape
    left_top, left_bottom, right_top, right_bottom = (
        float(part.sum()) / total for energy_K in (left_K, right_K) for part in (energy_K[:r], energy_K[-r:])
    )
    chances = min(r / rows_O, 1.0), min(r / cols_I, 1.0)
    return Overlap(left_top, left_bottom, right_top, right_bottom, *chances)


def intruders(
    delta: Delta, W_OI: torch.Tensor, spectrum: Spectrum, k: int = INTRUDER_K, epsilon: float = INTRUDER_EPSILON
) -> Intruders:
    """Get how many of the top k left singular vectors u' of W + dW are intruders: max_i |u_i . u'| < epsilon.

    `spectrum` must hold all K directions of W. Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of
    Equivalence" (arXiv 2410.21228), algorithm 1. They write the cosine without a sign; since a singular vector
    has none, its absolute value is meant. Where singular values of W nearly tie, a small update rotates
    their vectors freely and is counted too: `outside` does not count these.
    """
    k = min(k, *W_OI.shape)
    tuned_OI = W_OI + dense(delta).to(W_OI)
    tuned = decompose(Weight(spectrum.name, tuned_OI), k, dtype=spectrum.S_R.dtype)
    cosines_KR = (spectrum.U_OR.mT @ tuned.U_OR).abs()
    best_R = cosines_KR.max(dim=0).values
    inside_R = torch.linalg.vector_norm(cosines_KR[:k], dim=0)
    found_R = best_R < epsilon
    return Intruders(int(found_R.sum()), k, float(best_R.min()), int((found_R & (inside_R < epsilon)).sum()))

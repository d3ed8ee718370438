"""The update that best reproduces every adapter on that adapter's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import to_factors
from ..errors import OptionError
from .contract import Fusion, Part, of_factors

# A share of the mean of G's diagonal. Chosen with benchmarks/gradient_fusion.py: small enough that what it leaves is
# under the residual of 500 L-BFGS iterations, large enough that Cholesky never fails on a float64 Gram matrix.
EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class Gradient(Fusion):
    """Find, in closed form, the update that does on each adapter's own inputs what that adapter does.

    dW = argmin sum_i w_i |(dW_i - dW) X_i|_F^2 + eps |dW|_F^2
       = (sum_i w_i dW_i G_i) (sum_i w_i G_i + eps I)^-1,   G_i = X_i X_i^T (I x I, the inputs are not kept)

    One Cholesky factorisation of an I x I matrix for each layer. dW = sum_i B_i (w_i A_i G_i (...)^-1) has the summed
    rank of the updates, so it is an exact LoRA. `eps` is a share of the mean of G's diagonal; eps=0 gives the limit,
    the smallest change that fits best: dW = [dW_1 X_1, ...] [X_1, ...]^+, which is also where gradient descent from W
    ends. For a single adapter that is its update on the span of its inputs and zero outside: with fewer inputs than
    features dW is not dW_1. The weights say how much each adapter's error counts; only their ratios matter.

    Mix-of-Show (Gu et al., arXiv 2305.18292); its code solves this by up to 500 iterations of L-BFGS per layer.
    """

    name: ClassVar[str] = "gradient"
    paper: ClassVar[str] = "Mix-of-Show: Decentralized Low-Rank Adaptation (gradient fusion), arXiv 2305.18292"

    eps: float = EPS
    """Pull towards zero change, as a share of the mean of G's diagonal; 0 is the minimum-change limit."""

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise OptionError(f"eps={self.eps} must be a share of 0 or more.")

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        if min(weights) <= 0:
            raise OptionError(
                f"weights={list(weights)}: rule 'gradient' weighs errors, so all weights must be positive."
            )
        grams = [weight * _gram(part) for part, weight in zip(parts, weights, strict=True)]
        total_II = torch.stack(grams).sum(0) if len(grams) > 1 else grams[0]
        factors = [to_factors(part.delta) for part in parts]
        wanted_PI = torch.cat([A.to(gram) @ gram for (_, A), gram in zip(factors, grams, strict=True)])
        A_PI = _times_inverse(wanted_PI, total_II, self.eps, parts[0].layer)
        return of_factors(parts, torch.cat([B_OP for B_OP, _ in factors], dim=1), A_PI.to(factors[0][1]))


def _gram(part: Part) -> torch.Tensor:
    gram_II, width = part.gram_II, part.delta.shape[1]
    if gram_II is None:
        raise OptionError(
            f"{part.layer}: rule 'gradient' needs the inputs that {part.adapter} sees in this layer, and there are "
            "none. Pass activations=[collect_grams(model, batches), ...], or --examples on the command line."
        )
    if tuple(gram_II.shape) != (width, width) or not bool(torch.isfinite(gram_II).all()):
        shape = "x".join(map(str, gram_II.shape))
        raise OptionError(
            f"{part.layer}: the activations of {part.adapter} are {shape} or not finite, but a finite {width}x{width} "
            "matrix is needed. Collect them again with collect_grams."
        )
    return gram_II


def _times_inverse(wanted_PI: torch.Tensor, gram_II: torch.Tensor, eps: float, layer: str) -> torch.Tensor:
    """Get wanted (G + eps I)^-1, or wanted G^+ for eps = 0."""
    if not bool(gram_II.any()):
        return torch.zeros_like(wanted_PI)  # no input ever came: the smallest change is none
    if eps == 0:
        values_I, vectors_II = torch.linalg.eigh(gram_II)
        # Below this an eigenvalue is roundoff of the sum (the usual numerical rank).
        kept = values_I > gram_II.shape[0] * torch.finfo(gram_II.dtype).eps * values_I[-1]
        span_IR = vectors_II[:, kept]
        return (wanted_PI @ span_IR / values_I[kept]) @ span_IR.mT
    ridge_II = gram_II.clone()
    ridge_II.diagonal().add_(eps * gram_II.diagonal().mean())
    lower_II, failed = torch.linalg.cholesky_ex(ridge_II)
    if bool(failed):
        raise OptionError(
            f"{layer}: eps={eps:g} is too small for activations summed in {str(gram_II.dtype).removeprefix('torch.')}: "
            "their matrix is not positive definite. Raise eps, use eps=0, or collect in float64."
        )
    return torch.cholesky_solve(wanted_PI.mT, lower_II).mT

"""The update with which a layer of the merged model gives what each adapter's own model gives there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import dense, to_factors
from ..errors import OptionError
from ..thin_svd import thin_svd
from .contract import Fusion, Part, of_factors

# A share of the mean of G's diagonal. Chosen.
EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Match(Fusion):
    """Find the update with which the merged layer, fed by merged layers, gives what each adapter's own model gives.

    dW = argmin sum_i w_i |(W + dW) X_i - (W + dW_i) Z_i|_F^2 / n_i + e |dW - dW_0|_F^2
       = (sum_i w_i ((W + dW_i) C_i - W G_i) + e dW_0) (sum_i w_i G_i + e I)^-1

    X_i are the inputs of the layer over i's examples in the model merged so far, Z_i those in i's own model;
    G_i = X_i X_i^T / n_i, C_i = Z_i X_i^T / n_i, dW_0 is the mean update. The layers are visited in the order of a
    forward pass, so each makes up for what the merge of the layers below has changed. The result is cut to `rank`
    (None: the sum of the adapters' ranks) in the metric of its inputs: the SVD of dW L, L L^T = sum_i w_i G_i + e I.
    The weights say how much each adapter's error counts; only their ratios matter.

    Our own, on RegMean (arXiv 2212.09849) and RegMean++ (arXiv 2508.03121), which leave out what the layers below have
    changed in the targets. The pull towards the mean update, and not towards none, makes one adapter the identity.
    """

    name: ClassVar[str] = "match"
    paper: ClassVar[str] = "own; after RegMean (arXiv 2212.09849) and RegMean++ (arXiv 2508.03121)"
    behind: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    eps: float = EPS
    """e, as a share of the mean of G's diagonal."""
    rank: int | None = None
    """Rank of the result; None is the sum of the adapters' ranks."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank={self.rank} must be at least 1.")

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        _refuse_negative(self.name, weights)
        gram_II = wanted_OI = prior_OI = torch.zeros(())
        for part, weight in zip(parts, weights, strict=True):
            W_OI, G_II, C_II = _seen(part)
            update_OI = dense(part.delta)
            gram_II = gram_II + weight * G_II
            wanted_OI = wanted_OI + weight * ((W_OI + update_OI) @ C_II - W_OI @ G_II)
            prior_OI = prior_OI + weight / sum(weights) * update_OI
        ridge = self.eps * gram_II.diagonal().mean()
        lower_II = _lower(gram_II, ridge, self.eps, parts[0].layer)
        # dW L = (wanted + e dW_0) L^-T, and A = V^T L^-1.
        scaled_OI = torch.linalg.solve_triangular(lower_II, (wanted_OI + ridge * prior_OI).mT, upper=False).mT
        U_OK, S_K, Vh_KI = thin_svd(scaled_OI)
        kept = min(self.rank or _ranks(parts), len(S_K))
        A_RI = torch.linalg.solve_triangular(lower_II.mT, Vh_KI[:kept].mT, upper=True).mT
        return of_factors(parts, U_OK[:, :kept] * S_K[:kept], A_RI)


@dataclass(frozen=True, kw_only=True)
class Sequential(Fusion):
    """Find the update that does on each adapter's inputs what that adapter does, behind what is merged already.

    dW = argmin sum_i w_i |(dW_i - dW) X_i|_F^2 / n_i + e |dW - dW_0|_F^2
       = (sum_i w_i dW_i G_i + e dW_0) (sum_i w_i G_i + e I)^-1

    with X_i, G_i and dW_0 as for `match`. The rank of the result is the sum of the ranks.

    RegMean++ (Nguyen et al., arXiv 2508.03121); the pull towards the mean update is ours, as for `match`.
    """

    name: ClassVar[str] = "sequential"
    paper: ClassVar[str] = "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean, arXiv 2508.03121"
    behind: ClassVar[bool] = True

    eps: float = EPS
    """e, as a share of the mean of G's diagonal."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        _refuse_negative(self.name, weights)
        grams = [weight * _seen(part)[1] for part, weight in zip(parts, weights, strict=True)]
        total_II = torch.stack(grams).sum(0)
        ridge = self.eps * total_II.diagonal().mean()
        lower_II = _lower(total_II, ridge, self.eps, parts[0].layer)
        lefts, rights = zip(*(to_factors(part.delta) for part in parts), strict=True)
        pulls = [ridge * weight / sum(weights) for weight in weights]
        wanted_PI = torch.cat([A @ G + pull * A for A, G, pull in zip(rights, grams, pulls, strict=True)])
        return of_factors(parts, torch.cat(lefts, dim=1), torch.cholesky_solve(wanted_PI.mT, lower_II).mT)


def _check_eps(eps: float) -> None:
    if not 0 < eps < float("inf"):
        raise OptionError(f"eps={eps} must be a share above 0.")


def _refuse_negative(rule: str, weights: Sequence[float]) -> None:
    if min(weights) <= 0:
        raise OptionError(f"weights={list(weights)}: rule {rule!r} weighs errors, so all weights must be positive.")


def _lower(gram_II: torch.Tensor, ridge: torch.Tensor, eps: float, layer: str) -> torch.Tensor:
    """Get the Cholesky factor of G + ridge I."""
    eye_II = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    lower_II, failed = torch.linalg.cholesky_ex(gram_II + ridge * eye_II)
    if bool(failed):
        raise OptionError(
            f"{layer}: eps={eps:g} is too small for these examples: the matrix of their inputs is not positive "
            f"definite. Raise eps, or pass more examples."
        )
    return lower_II


def _seen(part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Get (W_OI, G_II, C_II); `OptionError` where a layer was not looked at."""
    if part.weight_OI is None or part.gram_II is None or part.cross_II is None:
        raise OptionError(
            f"{part.layer}: this rule looks at what the merged model does with each adapter's examples. Pass "
            f"model=the base and examples=[batches of each adapter], or --examples on the command line."
        )
    return part.weight_OI, part.gram_II, part.cross_II


def _ranks(parts: Sequence[Part]) -> int:
    return sum(min(to_factors(part.delta)[1].shape[0], *part.delta.shape) for part in parts)

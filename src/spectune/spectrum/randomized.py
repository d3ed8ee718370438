"""The randomized solver: block Golub-Kahan-Lanczos with full reorthogonalisation.

Golub, Luk, Overton (1981), from a Gaussian block as in Musco and Musco, arXiv 1504.05477. It keeps
every block that it multiplied, so on flat spectra it needs far fewer steps than subspace iteration.
Bases are stored as rows (`V_kI`, `U_kO`): a row-major weight multiplies a few rows fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .columns import Choice
from .found import Found, transposed

# The block is wider than the wanted directions: all copies of a repeated singular value fit, and the
# values beyond the cut are seen. Measured at 384^2 and 2048^2, r = 8, 16, 64: of 4 to 32 extra rows the
# fewest were fastest, and blocks of a multiple of 8 rows saved a step for the same time.
OVERSAMPLE = 4
WIDTH_MULTIPLE = 8
# Steps before the small problem is solved for the first time; nothing real converged earlier.
FIRST_CHECK = 3
# Share of the predicted wait until the next check, because convergence gets faster on the way. Measured.
CAUTION = 0.7
MAX_STEPS = 60
# A row that keeps half of its length in a projection is orthogonal to roundoff (Daniel, Gragg, Kaufman,
# Stewart 1976 take 1/sqrt(2) to 1/10). Two passes are the rule, five were never seen to be needed.
KEPT_LENGTH = 0.5
MOST_PASSES = 5
# A residual of this many units of roundoff (times S[0]) cannot be lowered. Measured on 2048 x 2048.
ROUNDOFF_UNITS = 8.0


class Basis:
    """A growing set of orthonormal rows; `extend` makes new ones out of a block."""

    def __init__(self, like: torch.Tensor, width: int, random: np.random.RandomState) -> None:
        self.rows_kN = like.new_empty(0, width)
        self._store = like.new_empty(0, width)
        self._random = random

    def __len__(self) -> int:
        return self.rows_kN.shape[0]

    def extend(self, block_bN: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add a block: get (Q_bN, old_bk, new_bb) with block = old basis + new Q, and Q now in the basis.

        Projection and QR are done until no row shrinks any more, twice as a rule: once loses
        orthogonality where little of the block is new, and a row of mere roundoff may lie in the basis.
        """
        block_bN, old_bk = self._project(block_bN)
        Q_bN, new_bb = self._orthonormal_rows(block_bN, floor)
        for _ in range(MOST_PASSES):
            Q_bN, more_bk = self._project(Q_bN)
            Q_Nb, again_bb = torch.linalg.qr(Q_bN.mT)
            Q_bN, old_bk, new_bb = Q_Nb.mT, old_bk + new_bb @ more_bk, new_bb @ again_bb.mT
            if bool((again_bb.diagonal().abs() > KEPT_LENGTH).all()):
                break
        self._append(Q_bN)
        return Q_bN, old_bk, new_bb

    def _orthonormal_rows(self, block_bN: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (Q_bN, L_bb) with block = L Q; random rows, with weight 0, fill up a block of lower rank."""
        Q_Nb, R_bb = torch.linalg.qr(block_bN.mT)
        if bool((R_bb.diagonal().abs() > floor).all()):
            return Q_Nb.mT, R_bb.mT
        # QR without pivoting hides live directions behind a dead one; the SVD sorts them out.
        P_bb, norms_b, Q_bN = torch.linalg.svd(block_bN, full_matrices=False)
        dead_b = norms_b <= floor
        Q_bN[dead_b] = gaussian(self._random, int(dead_b.sum()), Q_bN.shape[1], Q_bN)
        return Q_bN, P_bb * torch.where(dead_b, 0, norms_b)

    def _project(self, block_bN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old_bk = block_bN @ self.rows_kN.mT
        return torch.addmm(block_bN, old_bk, self.rows_kN, alpha=-1), old_bk

    def _append(self, Q_bN: torch.Tensor) -> None:
        count = len(self)
        if count + len(Q_bN) > len(self._store):
            grown = self._store.new_empty(2 * count + 4 * len(Q_bN), self._store.shape[1])
            grown[:count] = self.rows_kN
            self._store = grown
        self._store[count : count + len(Q_bN)] = Q_bN
        self.rows_kN = self._store[: count + len(Q_bN)]


def gaussian(random: np.random.RandomState, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Get standard normal numbers, the same on every device and for every version of torch."""
    return torch.from_numpy(random.standard_normal((rows, width))).to(like)


def block_width(count: int, K: int) -> int:
    """Get the number of rows of a block for `count` wanted directions."""
    return min(K, -(-(count + OVERSAMPLE) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def randomized(
    W_OI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int, most_rows: int | None = None
) -> Found:
    """Get the chosen directions; the leading `choice.leading` are found by block Krylov steps.

    Stops when `angle_bound` says that the leading subspace is within `tolerance`, or when its residual
    is roundoff, which is all there is where the cut goes through a repeated value. Otherwise gives up,
    `converged=False`, after MAX_STEPS or when the next block would make the basis wider than `most_rows`.
    """
    if W_OI.shape[0] < W_OI.shape[1]:
        return transposed(randomized(W_OI.mT, choice, tolerance=tolerance, seed=seed, most_rows=most_rows))
    count = choice.leading
    width = block_width(count, choice.K)
    most_steps = MAX_STEPS if most_rows is None else max(1, min(MAX_STEPS, most_rows // width))
    krylov = _Krylov(W_OI, width, np.random.RandomState(seed))
    checks: list[tuple[int, float]] = []
    for step in range(1, most_steps + 1):
        krylov.step()
        if step < _next_check(checks, tolerance) and not krylov.complete and step < most_steps:
            continue
        small = krylov.solve()
        checks.append((step, small.angle_bound(count)))
        if checks[-1][1] <= tolerance or small.is_roundoff(count, torch.finfo(W_OI.dtype).eps):
            return krylov.found(small, choice, step, True)
    return krylov.found(small, choice, most_steps, False)


def _next_check(checks: list[tuple[int, float]], tolerance: float) -> int:
    """Get the step at which the bound, falling as it fell last, would reach the tolerance."""
    if len(checks) < 2:
        return FIRST_CHECK + len(checks)
    (step0, bound0), (step1, bound1) = checks[-2:]
    if not 0 < bound1 < bound0 < math.inf or tolerance <= 0:
        return step1 + 1
    rate = math.log(bound0 / bound1) / (step1 - step0)
    wait = CAUTION * math.log(bound1 / tolerance) / rate
    return step1 + max(1, min(round(wait), step1 // 2))


@dataclass(frozen=True, eq=False)
class _Small:
    """The SVD of the small matrix B_kk, and |W^T u - s v| of every Ritz triplet."""

    X_kk: torch.Tensor
    values_k: torch.Tensor
    Yh_kk: torch.Tensor
    residuals_k: torch.Tensor
    whole: bool
    """The bases span everything: the Ritz values are the singular values."""

    def is_roundoff(self, count: int, eps: float) -> bool:
        """Can the residual of the leading directions be lowered no more?"""
        enough = self.whole or len(self.values_k) > count
        residual = float(torch.linalg.vector_norm(self.residuals_k[:count]))
        return enough and residual <= ROUNDOFF_UNITS * eps * float(self.values_k[0])

    def angle_bound(self, count: int) -> float:
        """Get a bound on the angle between the `count` leading Ritz directions and the true ones.

        For every m >= count, with E the residuals, s the Ritz values:
            |E[:count]| / (s[count-1] - s[m] - E[m]) * (1 + |E[count:m]| / (s[count-1] - s[count]));
        the least of them. m = count is Wedin's bound. It is far too wide for a Krylov space, whose
        residual is orthogonal to the next m directions too: only what lies beyond them can turn the
        leading ones at first order, and the second factor is the way round through them.
        """
        if len(self.values_k) <= count:
            return 0.0 if self.whole else math.inf
        s_k, E_k = self.values_k, self.residuals_k
        gap = float(s_k[count - 1] - s_k[count])
        leading = float(torch.linalg.vector_norm(E_k[:count]))
        if gap <= 0 or not math.isfinite(leading):
            return math.inf
        between_m = torch.cat([E_k.new_zeros(1), E_k[count:-1].square().cumsum(0).sqrt()])
        beyond_m = s_k[count - 1] - s_k[count:] - E_k[count:]
        bounds_m = leading / beyond_m * (1 + between_m / gap)
        bounds_m = torch.where(beyond_m > 0, bounds_m, torch.inf)
        return float(bounds_m.min())


class _Krylov:
    """Bases with W V^T = U^T B and W^T U^T = V^T B^T + what the last block adds."""

    def __init__(self, W_OI: torch.Tensor, width: int, random: np.random.RandomState) -> None:
        self.W_OI, self.width, self.random = W_OI, width, random
        self.left = Basis(W_OI, W_OI.shape[0], random)
        self.right = Basis(W_OI, W_OI.shape[1], random)
        self.B_kk = torch.zeros(0, 0, dtype=torch.float64)
        self.floor = 0.0
        self.next_bI = self.right.extend(gaussian(random, width, W_OI.shape[1], W_OI), 0.0)[0]
        self.rest_bb: torch.Tensor | None = None
        self.complete = False

    def step(self) -> None:
        """Multiply by W and by W^T once."""
        last_bO, old_bk, new_bb = self.left.extend(self.next_bI @ self.W_OI.mT, self.floor)
        self._grow(old_bk, new_bb)
        self.floor = max(self.floor, torch.finfo(self.W_OI.dtype).eps * float(self.B_kk.diagonal().abs().max()))
        room = self.W_OI.shape[1] - len(self.right)
        self.complete = room == 0
        if room >= self.width:
            self.next_bI, _, self.rest_bb = self.right.extend(last_bO @ self.W_OI, self.floor)
        elif room:
            # A last, narrower block: any rows complete the space, and then nothing is left over.
            rest_bI = gaussian(self.random, room, self.W_OI.shape[1], self.W_OI)
            self.next_bI, self.rest_bb = self.right.extend(rest_bI, self.floor)[0], None

    def _grow(self, old_bk: torch.Tensor, new_bb: torch.Tensor) -> None:
        columns_kb = torch.cat([old_bk, new_bb], dim=1).mT.double().cpu()
        upper_kk = torch.nn.functional.pad(self.B_kk, (0, 0, 0, new_bb.shape[0]))
        self.B_kk = torch.cat([upper_kk, columns_kb], dim=1)

    def solve(self) -> _Small:
        """Get the Ritz triplets of the bases as they stand."""
        X_kk, values_k, Yh_kk = torch.linalg.svd(self.B_kk)
        if self.complete:
            return _Small(X_kk, values_k, Yh_kk, torch.zeros_like(values_k), True)
        if self.rest_bb is None:
            return _Small(X_kk, values_k, Yh_kk, torch.full_like(values_k, math.inf), False)
        last_bk = X_kk[-self.width :]
        residuals_k = torch.linalg.vector_norm(self.rest_bb.double().cpu().mT @ last_bk, dim=0)
        return _Small(X_kk, values_k, Yh_kk, residuals_k, False)

    def found(self, small: _Small, choice: Choice, steps: int, converged: bool) -> Found:
        """Get the chosen triplets out of the two bases."""
        places, k = list(choice.places), len(small.values_k)
        left_Rk = small.X_kk.mT[places].to(self.W_OI)
        right_Rk = small.Yh_kk[places].to(self.W_OI)
        U_OR = (left_Rk @ self.left.rows_kN[:k]).mT
        Vh_RI = right_Rk @ self.right.rows_kN[:k]
        S_R = small.values_k[places].to(self.W_OI)
        values_N = small.values_k[: choice.leading + 1]
        return Found(U_OR, S_R, Vh_RI, values_N, "randomized", steps, converged)

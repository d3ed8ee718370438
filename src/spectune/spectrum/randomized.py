"""The randomized solver: block Golub-Kahan-Lanczos, fully reorthogonalised, for many equal-shaped weights at once.

Golub, Luk, Overton (1981), from a Gaussian block as in Musco and Musco, arXiv 1504.05477. It keeps
every block that it multiplied, so on flat spectra it needs far fewer steps than subspace iteration.
Letters: B weights of a batch, b rows of a block, k rows of a basis so far. Bases are
stored as rows (`V_BkI`, `U_BkO`): a row-major weight multiplies a few rows fastest.
"""

from __future__ import annotations

import math

import torch

from .columns import Choice
from .found import Found, transposed
from .orthonormal_rows import OrthonormalRows, gaussian
from .ritz import Ritz, solve_small

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


def block_width(count: int, K: int) -> int:
    """Get the number of rows of a block for `count` wanted directions."""
    return min(K, -(-(count + OVERSAMPLE) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def randomized(
    W_OI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int, most_rows: int | None = None
) -> Found:
    """Get the chosen directions of one weight; see `randomized_batch`."""
    return randomized_batch(W_OI[None], choice, tolerance=tolerance, seed=seed, most_rows=most_rows)[0]


def randomized_batch(
    W_BOI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int, most_rows: int | None = None
) -> list[Found]:
    """Get the chosen directions of every weight; the leading `choice.leading` are found by block Krylov steps.

    A weight is done when `Ritz.angle_bound` says that its leading subspace is within `tolerance`, or when its
    residual is roundoff, which is all there is where the cut goes through a repeated value; its result is the
    state at that step, however long the others take. Those left after MAX_STEPS, or when the next block would
    make the basis wider than `most_rows`, are given up: `converged=False`.
    """
    if W_BOI.shape[1] < W_BOI.shape[2]:
        found = randomized_batch(W_BOI.mT, choice, tolerance=tolerance, seed=seed, most_rows=most_rows)
        return [transposed(one) for one in found]
    width = block_width(choice.leading, choice.K)
    most_steps = MAX_STEPS if most_rows is None else max(1, min(MAX_STEPS, most_rows // width))
    waiting = list(range(len(W_BOI)))
    results: dict[int, Found] = {}
    krylov = _Krylov(W_BOI, width, seed)
    checks: list[tuple[int, float]] = []
    for step in range(1, most_steps + 1):
        krylov.step()
        if step < _next_check(checks, tolerance) and not krylov.complete and step < most_steps:
            continue
        ritz = krylov.solve(choice.leading, waiting)
        bounds = [one.angle_bound() for one in ritz]
        eps = torch.finfo(W_BOI.dtype).eps
        done = [bound <= tolerance or one.is_roundoff(eps) for bound, one in zip(bounds, ritz, strict=True)]
        last = step == most_steps
        for place, one, converged in zip(waiting, ritz, done, strict=True):
            if converged or last:
                results[place] = krylov.found(place, one, choice, step, converged)
        waiting = [place for place in waiting if place not in results]
        if not waiting:
            break
        checks.append((step, max(bound for bound, ready in zip(bounds, done, strict=True) if not ready)))
    return [results[place] for place in range(len(W_BOI))]


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


class _Krylov:
    """Bases with W V^T = U^T M and W^T U^T = V^T M^T + what the last block adds, for each weight of the batch."""

    def __init__(self, W_BOI: torch.Tensor, width: int, seed: int) -> None:
        count, rows_O, cols_I = W_BOI.shape
        self.W_BOI, self.width, self.seed = W_BOI, width, seed
        self.left = OrthonormalRows(W_BOI, rows_O, seed)
        self.right = OrthonormalRows(W_BOI, cols_I, seed)
        self.M_Bkk = torch.zeros(count, 0, 0, dtype=torch.float64)
        self.floor_B = W_BOI.new_zeros(count)
        start_BbI = gaussian(seed, width, cols_I, W_BOI).expand(count, -1, -1)
        self.next_BbI = self.right.extend(start_BbI, self.floor_B)[0]
        self.rest_Bbb: torch.Tensor | None = None
        self.complete = False

    def step(self) -> None:
        """Multiply by W and by W^T once."""
        last_BbO, old_Bbk, new_Bbb = self.left.extend(self.next_BbI @ self.W_BOI.mT, self.floor_B)
        self._grow(old_Bbk, new_Bbb)
        eps = torch.finfo(self.W_BOI.dtype).eps
        largest_B = self.M_Bkk.diagonal(dim1=1, dim2=2).abs().amax(1)
        self.floor_B = torch.maximum(self.floor_B, (eps * largest_B).to(self.floor_B))
        room = self.W_BOI.shape[2] - len(self.right)
        self.complete = room == 0
        if room >= self.width:
            self.next_BbI, _, self.rest_Bbb = self.right.extend(last_BbO @ self.W_BOI, self.floor_B)
        elif room:
            # A last, narrower block: any rows complete the space, and then nothing is left over.
            rest_bI = gaussian(self.seed + len(self.right), room, self.W_BOI.shape[2], self.W_BOI)
            rest_BbI = rest_bI.expand(len(self.W_BOI), -1, -1)
            self.next_BbI, self.rest_Bbb = self.right.extend(rest_BbI, self.floor_B)[0], None

    def _grow(self, old_Bbk: torch.Tensor, new_Bbb: torch.Tensor) -> None:
        # The small problem stands on the CPU in float64: it is tiny, and its accuracy limits everything else.
        columns_Bkb = torch.cat([old_Bbk, new_Bbb], dim=2).mT.double().cpu()
        # Zeros are appended and not padded: torch 2.6 refuses to pad the empty matrix of the first step.
        zeros_Bbk = self.M_Bkk.new_zeros(len(self.M_Bkk), new_Bbb.shape[1], self.M_Bkk.shape[2])
        self.M_Bkk = torch.cat([torch.cat([self.M_Bkk, zeros_Bbk], dim=1), columns_Bkb], dim=2)

    def solve(self, count: int, places: list[int]) -> list[Ritz]:
        """Get the Ritz triplets of the current bases, for some weights of the batch."""
        rest_Bbb = None if self.rest_Bbb is None else self.rest_Bbb[places].double().cpu()
        M_Bkk = self.M_Bkk if len(places) == len(self.M_Bkk) else self.M_Bkk[places]
        return solve_small(M_Bkk, rest_Bbb, count, self.complete, exactly=self.W_BOI.dtype == torch.float64)

    def found(self, place: int, ritz: Ritz, choice: Choice, steps: int, converged: bool) -> Found:
        """Get the chosen triplets of one weight out of its two bases."""
        wanted = list(choice.places)
        left_Rk, right_Rk = (rows_Rk.to(self.W_BOI) for rows_Rk in ritz.triplets(self.M_Bkk[place], wanted))
        k = self.M_Bkk.shape[1]
        U_OR = (left_Rk @ self.left.rows_BkA[place, :k]).mT
        Vh_RI = right_Rk @ self.right.rows_BkA[place, :k]
        S_R = ritz.values_k[wanted].to(self.W_BOI)
        return Found(U_OR, S_R, Vh_RI, ritz.values_k[: choice.leading + 1], "randomized", steps, converged)

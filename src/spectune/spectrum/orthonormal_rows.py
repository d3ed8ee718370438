"""`OrthonormalRows`: a growing set of orthonormal rows, one for each weight of a batch."""

from __future__ import annotations

import numpy as np
import torch

from ..thin_svd import thin_svd

# One projection and QR leave an overlap with the older rows of about eps times (longest row of the block) / (shortest
# new part), and the recurrence lets it grow. Measured on real, flat, power-law and repeated spectra: up to a ratio of 4
# the bases stay as orthonormal as with two passes; at 8 one with repeated values lost two digits. Beyond it projection
# and QR are done again, "twice is enough" as a rule (Daniel, Gragg, Kaufman, Stewart 1976); five were never needed.
LOST_LENGTH = 4.0
MOST_PASSES = 5
# Blocks that a basis has room for before it is copied into a larger one; weights that decay need 5 to 9.
FIRST_BLOCKS = 8


class OrthonormalRows:
    """Orthonormal rows for every weight of a batch; `extend` adds those of one more block."""

    def __init__(self, like: torch.Tensor, width: int, seed: int) -> None:
        self.rows_BkA = like.new_empty(like.shape[0], 0, width)
        self._store = self.rows_BkA
        self._seed = seed

    def __len__(self) -> int:
        return self.rows_BkA.shape[1]

    def extend(self, block_BbA: torch.Tensor, floor_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add a block: get (fresh_BbA, old_Bbk, new_Bbb), block = old rows + new fresh; the fresh rows are added.

        Projection and QR are done again for as long as a row loses much of its length in them: once loses
        orthogonality where little of the block is new, and a row of mere roundoff may lie in the basis.
        """
        longest_B = torch.linalg.vector_norm(block_BbA, dim=2).amax(1)
        rest_BbA, old_Bbk = self._project(block_BbA)
        fresh_BbA, new_Bbb, filled = self._orthonormal_rows(rest_BbA, floor_B)
        shortest_B = new_Bbb.diagonal(dim1=1, dim2=2).abs().amin(1)
        lost = filled or not bool((longest_B <= LOST_LENGTH * shortest_B).all())
        for _ in range(MOST_PASSES):
            if not lost:
                break
            fresh_BbA, more_Bbk = self._project(fresh_BbA)
            fresh_BAb, again_Bbb = torch.linalg.qr(fresh_BbA.mT)
            fresh_BbA, old_Bbk, new_Bbb = fresh_BAb.mT, old_Bbk + new_Bbb @ more_Bbk, new_Bbb @ again_Bbb.mT
            lost = not bool((again_Bbb.diagonal(dim1=1, dim2=2).abs() * LOST_LENGTH > 1).all())
        self._append(fresh_BbA)
        return fresh_BbA, old_Bbk, new_Bbb

    def _orthonormal_rows(
        self, block_BbA: torch.Tensor, floor_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Get (fresh_BbA, L_Bbb, filled) with block = L fresh; a block of lower rank gets random rows of weight 0."""
        fresh_BAb, triangle_Bbb = torch.linalg.qr(block_BbA.mT)
        if bool((triangle_Bbb.diagonal(dim1=1, dim2=2).abs() > floor_B[:, None]).all()):
            return fresh_BAb.mT, triangle_Bbb.mT, False
        # QR without pivoting hides live directions behind a dead one; the SVD sorts them out.
        X_Bbb, norms_Bb, fresh_BbA = thin_svd(block_BbA)
        dead_Bb = norms_Bb <= floor_B[:, None]
        b, A = fresh_BbA.shape[1:]
        # A stream of its own for every place of the basis, so that a weight gets the same rows in any batch.
        fill_bA = gaussian(self._seed + 1 + len(self), b, A, block_BbA)
        fresh_BbA = torch.where(dead_Bb[:, :, None], fill_bA, fresh_BbA)
        return fresh_BbA, X_Bbb * torch.where(dead_Bb, 0, norms_Bb)[:, None, :], True

    def _project(self, block_BbA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old_Bbk = block_BbA @ self.rows_BkA.mT
        return torch.baddbmm(block_BbA, old_Bbk, self.rows_BkA, alpha=-1), old_Bbk

    def _append(self, fresh_BbA: torch.Tensor) -> None:
        count, b = len(self), fresh_BbA.shape[1]
        if count + b > self._store.shape[1]:
            B, _, A = self._store.shape
            grown = self._store.new_empty(B, 2 * count + FIRST_BLOCKS * b, A)
            grown[:, :count] = self.rows_BkA
            self._store = grown
        self._store[:, count : count + b] = fresh_BbA
        self.rows_BkA = self._store[:, : count + b]


def gaussian(seed: int, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Get standard normal numbers, the same on every device and for every version of torch."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((rows, width))).to(like)

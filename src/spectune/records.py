"""The three records that travel between rooms: `Weight`, `Spectrum`, `Delta`.

    Weight --spectrum--> Spectrum --methods, with the trained numbers--> Delta --fusion/export--> file

Letters on tensors: O outputs, I inputs, K = min(O, I), R kept directions, P and Q the widths of an update,
N tokens, C coefficients of a sparse core; CONTRIBUTING.md lists all letters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .thin_svd import thin_svd

# Below this gap at the cut (a fraction of S[0]) another solver may return other directions altogether. Ten times
# float32 roundoff.
SURE_GAP = 1e-6


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix of a model, always out x in, whatever the layer stores.

    `name` is its place in the model (`layers.3.q_proj`); every error about it begins with that name.
    """

    name: str
    W_OI: torch.Tensor


@dataclass(frozen=True)
class Quality:
    """How accurate a `Spectrum` is, as measured.

    All figures are fractions of the largest singular value found, or dimensionless.
    """

    solver: str
    """Which solver ran (`exact`, `gram`, `randomized`): with `auto`, the one that it chose."""
    residual: float
    """max_i |W v_i - s_i u_i| and |W^T u_i - s_i v_i|, as a fraction of S_R[0]."""
    orthogonality: float
    """Largest entry of |U^T U - I| and |Vh Vh^T - I|."""
    gap: float
    """Distance from the kept singular values to the nearest one left out, as a fraction of S_R[0].
    Infinite when nothing is left out. The kept subspace is only determined up to residual / gap."""
    steps: int = 0
    """Block Krylov steps taken; 0 for a direct solver."""
    converged: bool = True
    """False when the solver stopped before the wanted subspace had settled."""
    cached: bool = False
    """True when it was read from the cache on disk and checked, not computed here."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """R singular directions of one weight: W_OI ~ U_OR diag(S_R) Vh_RI + what is left out.

    `columns[i]` is the position of direction i in the full descending spectrum (0 is the strongest).
    """

    U_OR: torch.Tensor
    S_R: torch.Tensor
    Vh_RI: torch.Tensor
    columns: tuple[int, ...]
    quality: Quality
    name: str = ""
    source: str = "weight"
    """What the directions were found in: the weight, or data (`spectune.prepare`), where S_i = u_i^T W v_i all the
    same, and U_OR diag(S_R) Vh_RI is no approximation of W."""
    places: torch.Tensor | None = None
    """Places i R + j between directions u_i and v_j that data have ranked (`spectune.prepare`), the best first."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, I, R)."""
        return self.U_OR.shape[0], self.Vh_RI.shape[1], self.S_R.shape[0]

    @property
    def is_found_again(self) -> bool:
        """Whether these directions can be computed again from a rounded base, on another machine, up to a rotation.

        Only leading directions above a gap: away from the top, rounding the base mixes in directions that were not
        kept, 2% (bottom) to 10% (random) of the update on MiniLM's weights in bfloat16, which no rotation undoes. Files
        store such bases.
        """
        leading = self.columns == tuple(range(self.shape[2])) and self.quality.gap >= SURE_GAP
        return leading and self.source == "weight"

    @classmethod
    def unknown(cls, rows_O: int, cols_I: int, rank: int, name: str = "", source: str = "weight") -> Spectrum:
        """Get zeros that a file will fill with the directions; rank 0 for methods without any."""
        found = float("nan") if rank else 0.0
        quality = Quality(solver="file" if rank else "none", residual=found, orthogonality=found, gap=float("inf"))
        columns = tuple(range(rank))
        return cls(
            torch.zeros(rows_O, rank), torch.zeros(rank), torch.zeros(rank, cols_I), columns, quality, name, source
        )

    def rotated(self, delta: Delta) -> Spectrum:
        """Get the spectrum of the tuned weight W + dW for an update inside these directions, without another SVD.

        dW = U C Vh changes W = U diag(S) Vh + rest to U (diag(S) + C) Vh + rest, and only the R x R middle
        is decomposed. Exact when the rest is orthogonal to these directions, as it always is. The rest
        may now hold larger singular values than these, so `columns` are those of the weight before.

        Raises ValueError for an update that leaves these directions (spectral_a), and for directions of data.
        Spectral Adapter (arXiv 2405.13952), Lemma 4.1: this is how adapters are stacked.
        """
        if self.source != "weight":
            raise ValueError(
                f"{self.name or 'weight'}: these directions were found in data and hold no singular values."
            )
        if delta.left_OP is not self.U_OR or delta.right_QI is not self.Vh_RI:
            raise ValueError(
                f"{self.name or 'weight'}: the update reaches outside these singular directions, so it cannot rotate "
                "them."
            )
        middle_RR = torch.diag(self.S_R) + delta.core_matrix()
        X_RR, S_R, Yh_RR = thin_svd(middle_RR)
        return Spectrum(self.U_OR @ X_RR, S_R, Yh_RR @ self.Vh_RI, self.columns, self.quality, self.name)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Spectrum:
        """Get the same directions on another device or in another dtype."""
        U_OR, S_R, Vh_RI = (t.to(device=device, dtype=dtype) for t in (self.U_OR, self.S_R, self.Vh_RI))
        return replace(self, U_OR=U_OR, S_R=S_R, Vh_RI=Vh_RI)


@dataclass(frozen=True, eq=False)
class SparseCore:
    """A P x Q matrix with C entries: core[rows_C[i], cols_C[i]] = values_C[i], each place once."""

    rows_C: torch.Tensor
    cols_C: torch.Tensor
    values_C: torch.Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Delta:
    """The normal form of every update: dW_OI = left_OP . core_PQ . right_QI.

    The core is a vector (a diagonal, P = Q), a matrix, or a `SparseCore`.
    """

    left_OP: torch.Tensor
    core: torch.Tensor | SparseCore
    right_QI: torch.Tensor

    def core_matrix(self) -> torch.Tensor:
        """Get the core as a dense P x Q matrix, differentiable in its numbers."""
        if isinstance(self.core, SparseCore):
            empty_PQ = self.core.values_C.new_zeros(self.core.shape)
            return empty_PQ.index_put((self.core.rows_C, self.core.cols_C), self.core.values_C)
        return torch.diag(self.core) if self.core.ndim == 1 else self.core

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left_OP.shape[0], self.right_QI.shape[1]

    @property
    def width(self) -> tuple[int, int]:
        """(P, Q)."""
        return self.left_OP.shape[1], self.right_QI.shape[0]

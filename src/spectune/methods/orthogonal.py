"""Two baselines whose frozen factors are slices of random orthogonal matrices: LiDB, Orthogonal Adaptation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from ..algebra import scale
from ..errors import WeightError
from ..records import Delta, Spectrum
from .contract import Columns, Method, Tensors, option


@dataclass(frozen=True, kw_only=True)
class LiDB(Method):
    """Train a low-rank map between two small random subspaces, one of the outputs, one of the inputs.

    dW_OI = E_OP . (A_PR B_RQ) . F_QI,   E and F frozen slices of random orthogonal matrices; trains (P + Q) r

    A starts at zero, B as LoRA's down matrix does. E and F follow from the seed and the shape, so
    the file need not store them; weights of one shape share them.

    The rows of E^T and F have length one. The Spectral Adapter's code has the same length, but draws them anew in each
    layer from the global random state and stores them in the file.

    Lightweight DreamBooth, HyperDreamBooth (Ruiz et al., arXiv 2307.06949), section 4.1, which
    calls P = 50 and Q = 100 a and b, and E and F P and Q, as our state dict does.
    """

    name: ClassVar[str] = "lidb"
    paper: ClassVar[str] = "HyperDreamBooth (Lightweight DreamBooth), arXiv 2307.06949"
    use_when: ClassVar[str] = "You compare with the papers on concepts: the smallest adapters among their baselines."
    # Between the Spectral Adapter's comparison (5e-4 for the text encoder, 1e-4 for the UNet) and what suits small
    # models best, 3e-3 (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 1e-3

    r: int = option(8, "Inner rank.")
    output_width: int = option(50, "P, the width of the random output subspace (at most O).")
    input_width: int = option(100, "Q, the width of the random input subspace (at most I).")
    basis_seed: int = option(0, "Seed of the frozen orthogonal factors; kept in the file.")

    def __post_init__(self) -> None:
        self._at_least(1, r=self.r, output_width=self.output_width, input_width=self.input_width)
        self._at_least(0, basis_seed=self.basis_seed)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return 0, "top"

    def _widths(self, rows_O: int, cols_I: int) -> tuple[int, int]:
        return min(self.output_width, rows_O), min(self.input_width, cols_I)

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> LiDB:
        narrowest = min(self._widths(rows_O, cols_I))
        return self if self.r <= narrowest else replace(self, r=narrowest)

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        P, Q = self._widths(rows_O, cols_I)
        return {"A": (P, self.r), "B": (self.r, Q)}

    def start(self, rows_O: int, cols_I: int, seed: int = 0) -> dict[str, torch.Tensor]:
        P, Q = self._widths(rows_O, cols_I)
        B_RQ = torch.empty(self.r, Q)
        torch.nn.init.kaiming_uniform_(B_RQ, a=5**0.5, generator=torch.Generator().manual_seed(seed))
        return {"A": torch.zeros(P, self.r), "B": B_RQ}

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        rows_O, cols_I, _ = spectrum.shape
        P, Q = self._widths(rows_O, cols_I)
        E_PO = orthogonal_rows(P, rows_O, 2 * self.basis_seed)
        return {"P": E_PO.T.contiguous(), "Q": orthogonal_rows(Q, cols_I, 2 * self.basis_seed + 1)}

    def large_frozen(self) -> tuple[str, ...]:
        return "P", "Q"

    def gradient_axes(self) -> dict[str, int]:
        return {"A": 0, "B": 1}

    def matrix_steps(self) -> dict[str, str]:
        return {"A": "weight", "B": "one"}  # kaiming's B has singular values of about 0.6

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        dtype = trained["A"].dtype
        whole = Delta(frozen["P"].to(dtype), trained["A"] @ trained["B"], frozen["Q"].to(dtype))
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, *self._widths(rows_O, cols_I))


@dataclass(frozen=True, kw_only=True)
class OrthogonalAdaptation(Method):
    """Train the up matrix of a LoRA whose down matrix is r rows of one orthogonal matrix for all concepts.

    dW_OI = B_OR . A_RI,   A_RI = rows [concept r, (concept + 1) r) of an orthogonal I x I matrix; trains O r

    Concepts with different numbers have disjoint rows, so dW_i dW_j^T = 0 and their sum does not mix:
    what the paper wants. The version in the Spectral Adapter's code misses it: there every concept
    draws the same rows. Its rows are also halved; here they have length one, so that the same B is twice
    the update of theirs, and rates do not carry over unchanged.

    Orthogonal Adaptation (Po et al., arXiv 2312.02432), section 4.
    """

    name: ClassVar[str] = "orthogonal_adaptation"
    paper: ClassVar[str] = "Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv 2312.02432"
    use_when: ClassVar[str] = "You compare with the papers on merging concepts: their baseline trained to be merged."
    # Between LoRA's in the same comparison (1e-4, UNet) and what suits small models best, 3e-3
    # (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 3e-4

    r: int = option(8, "Rows of the orthogonal matrix that this adapter owns.")
    concept: int = option(0, "Which block of rows; give every adapter that will be fused another number.")
    basis_seed: int = option(0, "Seed of the orthogonal matrix; must be equal for all adapters that will be fused.")

    def __post_init__(self) -> None:
        self._at_least(1, r=self.r)
        self._at_least(0, concept=self.concept, basis_seed=self.basis_seed)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return 0, "top"

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> OrthogonalAdaptation:
        # Other concepts begin where this r says; with another one they would share rows, so `frozen` refuses them.
        return replace(self, r=cols_I) if self.concept == 0 and self.r > cols_I else self

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"B": (rows_O, self.r)}

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        cols_I, last = spectrum.shape[1], (self.concept + 1) * self.r
        if last > cols_I:
            raise WeightError(
                f"{spectrum.name or 'weight'}: concept {self.concept} at r={self.r} needs {last} rows, but the "
                f"orthogonal matrix of this layer has {cols_I}. Lower r or use at most {cols_I // self.r} concepts."
            )
        return {"A": orthogonal_rows(last, cols_I, self.basis_seed)[last - self.r :].contiguous()}

    def large_frozen(self) -> tuple[str, ...]:
        return ("A",)

    def is_linear(self) -> bool:
        return True

    def gradient_axes(self) -> dict[str, int]:
        return {"B": 0}

    def matrix_steps(self) -> dict[str, str]:
        return {"B": "weight"}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        B_OR = trained["B"]
        return Delta(B_OR, B_OR.new_full((self.r,), strength), frozen["A"].to(B_OR.dtype))

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, rows_O)


def orthogonal_rows(count: int, width: int, seed: int) -> torch.Tensor:
    """Get the first `count` rows of the random orthogonal width x width matrix of a seed, float32.

    The rows do not depend on `count`. Uniform over the orthogonal matrices (QR of a Gaussian with the
    diagonal of the triangle made positive: Mezzadri, arXiv math-ph/0609050), from numpy's frozen RandomState stream.
    """
    gaussian_PI = np.random.RandomState(seed).standard_normal((count, width))
    unit_IP, triangle_PP = torch.linalg.qr(torch.from_numpy(gaussian_PI).T)
    return (unit_IP * torch.sign(triangle_PP.diagonal())).T.float()

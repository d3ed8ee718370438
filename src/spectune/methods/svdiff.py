"""SVDiff: shift the singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import scale
from ..errors import LeftOutError
from ..records import Delta, Spectrum
from .contract import Columns, Tensors, Tied, kept_directions, option, weakness


@dataclass(frozen=True, kw_only=True)
class SVDiff(Tied):
    """Train one shift c per singular value; the singular vectors stay.

    dW_OI = U_OK . diag(relu(S + c) - S) . Vh_KI,   trains K numbers

    The same relu is used in forward, merge and export (in the code that the Spectral Adapter compares
    with, merging leaves it out). A singular value of exactly zero cannot be lifted: relu has no
    gradient there.

    SVDiff (Han et al., arXiv 2303.11305), equation 2; their delta is our c.
    """

    name: ClassVar[str] = "svdiff"
    paper: ClassVar[str] = "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning, arXiv 2303.11305"
    use_when: ClassVar[str] = (
        "The singular vectors must stay, and a step may take longer: it needs the full SVD, and no small LoRA holds it."
    )
    # Between the Spectral Adapter's comparison (1e-3 for the text encoder, 1e-4 for the UNet) and what suits small
    # models best, 1e-2 (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 3e-3

    basis_rank: int | None = option(None, "How many top singular values may shift; None is all K = min(O, I).")

    def __post_init__(self) -> None:
        self._check_share()
        self._at_least(1, basis_rank=self.basis_rank)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return kept_directions(self.basis_rank, rows_O, cols_I), "top"

    def shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"shift": (kept_directions(self.basis_rank, rows_O, cols_I),)}

    def size_option(self) -> str:
        return "basis_rank"

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        return {"shift": torch.arange(1, kept_directions(self.basis_rank, rows_O, cols_I) + 1)}

    def check(self, spectrum: Spectrum) -> None:
        if not bool(spectrum.S_R.any()):
            raise LeftOutError(
                f"{spectrum.name or 'weight'}: all singular values are zero, and svdiff has no gradient there. Exclude "
                f"the layer or use method='svft'.",
                "all zero, so svdiff would get no gradient",
            )

    def gradient_axes(self) -> dict[str, int]:
        return {"shift": 0}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        return {"shift": weakness(spectrum)}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        core_K = torch.relu(spectrum.S_R + trained["shift"]) - spectrum.S_R
        whole = Delta(spectrum.U_OR, core_K, spectrum.Vh_RI)
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return kept_directions(self.basis_rank, rows_O, cols_I)

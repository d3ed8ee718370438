"""One-sided adaptation: a free matrix on one side, frozen singular vectors on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import OptionError
from ..records import Delta, Spectrum
from .contract import Columns, Tensors, Tied, kept_directions, option, weakness

SIDES = ("right", "left")


@dataclass(frozen=True, kw_only=True)
class OneSided(Tied):
    """Train what the top singular directions of one side are mapped to.

    side right:  dW_OI = M_OR . Vh_RI,   trains O r;   Vh the top right singular vectors, frozen
    side left:   dW_OI = U_OR . M_RI,    trains I r;   U the top left singular vectors, frozen

    M starts at zero. Half of LoRA's numbers at the same rank on a square weight, and the frozen factor is orthonormal,
    so |dW| = |M|. The right side reads only the top r directions of the input; the left side writes only into the top r
    of the output, and keeps the whole input for the backward, as LoRA does.

    PiCa (ICLR 2026) is the right side; their B is our M. They share one M among the layers of a kind, here
    `share="kind"` does; by default each weight has its own. The left side is its mirror, ours.
    """

    name: ClassVar[str] = "one_sided"
    takes_any_directions: ClassVar[bool] = True
    paper: ClassVar[str] = "PiCa, parameter-efficient fine-tuning with column space projection, ICLR 2026"
    use_when: ClassVar[str] = "One side of each layer must stay as it is; half of a LoRA's numbers at the same rank."
    # Between LoRA's usual 2e-4 and specadapt's 3e-3; chosen, not measured.
    learning_rate: ClassVar[float] = 1e-3

    r: int = option(8, "How many singular directions are frozen on one side.")
    side: str = option("right", "Which factor is frozen: `right` (singular vectors of the input) or `left` (output).")

    def __post_init__(self) -> None:
        self._check_share()
        self._at_least(1, r=self.r)
        if self.side not in SIDES:
            raise OptionError(f"one_sided: side={self.side!r} does not exist. Use 'right' or 'left'.")

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return self.r, "top"

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> OneSided:
        r = kept_directions(self.r, rows_O, cols_I)
        return self if r == self.r else replace(self, r=r)

    def shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"M": (rows_O, self.r) if self.side == "right" else (self.r, cols_I)}

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        place_R = torch.arange(1, self.r + 1)
        return {"M": place_R[None, :] if self.side == "right" else place_R[:, None]}

    def is_linear(self) -> bool:
        return True

    def gradient_axes(self) -> dict[str, int]:
        return {"M": 0 if self.side == "right" else 1}

    def matrix_steps(self) -> dict[str, str]:
        return {"M": "weight"}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_R = weakness(spectrum)
        return {"M": weak_R[None, :] if self.side == "right" else weak_R[:, None]}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        M, core_R = trained["M"], spectrum.S_R.new_full((self.r,), strength)
        return Delta(M, core_R, spectrum.Vh_RI) if self.side == "right" else Delta(spectrum.U_OR, core_R, M)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, rows_O, cols_I)

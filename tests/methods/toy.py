"""A method that is not in the package, as its author would write it: one file. The row is in `test_a_new_method.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectune.algebra import scale
from spectune.methods.contract import Columns, Method, Tensors, option
from spectune.records import Delta, Spectrum


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Scale each kept direction, and mix neighbours: dW = U (diag(t) + e N) Vh with one shared e, N fixed."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none"
    learning_rate: ClassVar[float] = 1e-2

    r: int = option(4, "Directions that the toy scales.")
    wobble: float = option(0.5, "How much neighbours mix in the toy.")

    def __post_init__(self) -> None:
        self._at_least(2, r=self.r)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return self.r, "top"

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"toy_stretch": (self.r,)}

    def shared_by(self) -> str:
        return "model"

    def shared_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"toy_mix": (1,)}

    def start(self, rows_O: int, cols_I: int, seed: int = 0) -> dict[str, torch.Tensor]:
        return {"toy_stretch": torch.zeros(self.r), "toy_mix": torch.zeros(1)}

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        return {"toy_neighbours": torch.diag(torch.ones(self.r - 1), 1)}

    def gradient_axes(self) -> dict[str, int]:
        return {"toy_stretch": 0}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        mixed_RR = self.wobble * trained["toy_mix"] * frozen["toy_neighbours"].to(trained["toy_mix"].dtype)
        whole = Delta(spectrum.U_OR, torch.diag(trained["toy_stretch"]) + mixed_RR, spectrum.Vh_RI)
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, rows_O, cols_I)

"""Spectral Adapter A: add to the top singular vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import scale
from ..records import Delta, Spectrum
from .contract import Columns, Method, Tensors, fit_directions, option, refuse_dead_directions, weakness


@dataclass(frozen=True, kw_only=True)
class SpectralA(Method):
    """Add trained numbers to the chosen singular vectors; the rest of the weight stays.

    W'  = (U + A_U) diag(S) (Vh + A_Vh) + (what the chosen directions leave of W)
    dW_OI = [A_U, U]_O(2R) . diag(S, S) . [Vh + A_Vh ; A_Vh]_(2R)I,   rank <= 2r

    Trains r(O + I) numbers, as LoRA of rank r does, but reaches rank 2r. The step on W is
    proportional to S, so its learning rate is tied to the spectrum and not to LoRA's. It reaches
    exactly the weights that PiSSA of rank r reaches; they differ in preconditioning and in what
    weight decay pulls towards (here: the pretrained weight).

    `train_singular_values` adds r numbers C, one to each singular value: diag(S + C) in place of diag(S), still of
    rank 2r. The paper has no C; the authors' text-to-image code trains it, their language code does not.

    Spectral Adapter (Zhang & Pilanci, arXiv 2405.13952), section 3, "Spectral Adapter^A"; their
    V is our Vh^T, their A_V is our A_Vh^T, the C of their code is our `shift`. Their code rounds U, S, V and the rest
    of W to the base's precision, so that a bfloat16 base begins 0.3% off W; here the base weight stays as it is.
    """

    name: ClassVar[str] = "spectral_a"
    paper: ClassVar[str] = "Spectral Adapter: Fine-Tuning in Spectral Space, arXiv 2405.13952"
    use_when: ClassVar[str] = (
        "Your first choice in place of a LoRA: as many numbers, about as accurate, and adapters on disjoint "
        "directions add up without cross terms."
    )
    # Between the paper's tuned GLUE rates, 1e-4 to 7e-4 (DeBERTaV3-base, r = 24), and what suits small models best,
    # 3e-3 (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 1e-3

    r: int = option(8, "How many singular directions are tuned.")
    columns: Columns = option(
        "top", 'Which ones: "top", "bottom", "random", a start index in the descending spectrum, or a list.'
    )
    train_singular_values: bool = option(
        False, "Also train C, one shift for each singular value, as the authors' text-to-image code does."
    )

    def __post_init__(self) -> None:
        self._at_least(1, r=self.r)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return self.r, self.columns

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> SpectralA:
        return fit_directions(self, rows_O, cols_I, name)

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"A_U": (rows_O, self.r), "A_Vh": (self.r, cols_I)}
        return shapes | {"shift": (self.r,)} if self.train_singular_values else shapes

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        if self.columns != "top" and not isinstance(self.columns, int):
            return {}
        place_R = torch.arange(1, self.r + 1)
        sizes = {"A_U": place_R[None, :], "A_Vh": place_R[:, None]}
        return sizes | {"shift": place_R} if self.train_singular_values else sizes

    def check(self, spectrum: Spectrum) -> None:
        refuse_dead_directions(self.name, spectrum)

    def gradient_axes(self) -> dict[str, int]:
        return {"A_U": 0, "A_Vh": 1}

    def matrix_steps(self) -> dict[str, str]:
        # They stand beside unit vectors, and S is between them.
        return {"A_U": "one", "A_Vh": "one"}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_R = weakness(spectrum)
        profile = {"A_U": weak_R[None, :], "A_Vh": weak_R[:, None]}
        return profile | {"shift": weak_R} if self.train_singular_values else profile

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        A_U, A_Vh, S_R = trained["A_U"], trained["A_Vh"], spectrum.S_R
        left_OP = torch.cat([A_U, spectrum.U_OR], dim=1)
        if self.train_singular_values:
            # A_U (S + C) (Vh + A_Vh) + U ((S + C) A_Vh + C Vh): what the tuned part has beyond U S Vh.
            shifted_R, shift_R = S_R + trained["shift"], trained["shift"]
            below_RI = shifted_R[:, None] * A_Vh + shift_R[:, None] * spectrum.Vh_RI
            right_PI = torch.cat([spectrum.Vh_RI + A_Vh, below_RI], dim=0)
            whole = Delta(left_OP, torch.cat([shifted_R, torch.ones_like(shifted_R)]), right_PI)
        else:
            right_PI = torch.cat([spectrum.Vh_RI + A_Vh, A_Vh], dim=0)
            whole = Delta(left_OP, torch.cat([S_R, S_R]), right_PI)
        return whole if strength == 1.0 else scale(whole, strength)

    def direction_axes(self) -> dict[str, int]:
        axes = {"A_U": 1, "A_Vh": 0}
        return axes | {"shift": 0} if self.train_singular_values else axes

    def cross_terms(self, spectrum: Spectrum, mine: Tensors, theirs: Tensors) -> Delta:
        if self.train_singular_values:
            both = {name: mine[name] + theirs[name] for name in mine}
            deltas = [
                self.delta(spectrum, both, {}),
                self.delta(spectrum, mine, {}, -1.0),
                self.delta(spectrum, theirs, {}, -1.0),
            ]
            cores = [delta.core for delta in deltas if isinstance(delta.core, torch.Tensor)]
            left_OP = torch.cat([delta.left_OP for delta in deltas], dim=1)
            return Delta(left_OP, torch.cat(cores), torch.cat([delta.right_QI for delta in deltas]))
        # A_U,1 S A_Vh,2 + A_U,2 S A_Vh,1: the product of the sums has these, the updates have not.
        left_OP = torch.cat([mine["A_U"], theirs["A_U"]], dim=1)
        return Delta(left_OP, torch.cat([spectrum.S_R, spectrum.S_R]), torch.cat([theirs["A_Vh"], mine["A_Vh"]]))

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(2 * self.r, rows_O, cols_I)

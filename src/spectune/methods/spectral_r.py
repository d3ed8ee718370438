"""Spectral Adapter R: rotate the top singular vectors inside their own planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..records import Delta, Spectrum
from .contract import Columns, Tensors, Tied, fit_directions, option, refuse_dead_directions, weakness


@dataclass(frozen=True, kw_only=True)
class SpectralR(Tied):
    """Rotate the chosen left and the chosen right singular vectors among themselves.

    W'  = (U R_U) diag((1 + c) S) (R_V^T Vh) + (what the chosen directions leave of W)
    dW_OI = U . (R_U diag((1 + c) S) R_V^T - diag(S))_RR . Vh,   rank r
    R_U = (1 + X)(1 - X)^-1, X skew-symmetric, R_V alike: the Cayley transform, always a rotation

    Trains r(r - 1): one triangle of r(r - 1)/2 numbers for each side, half of what the official code
    stores, because only the skew part of its square matrices matters. Without c every singular value of
    W stays, so the tuned weight already has its SVD (Lemma 4.1; `Spectrum.rotated`). A partial strength
    scales X and c, so half a rotation is a rotation. Cayley cannot reach a rotation by 180 degrees.

    Spectral Adapter (Zhang & Pilanci, arXiv 2405.13952), section 4.3, "Spectral Adapter^R". Their code
    calls X Q, takes its inverse sign and a multiplicative scale that starts at one; ours is 1 + c with c at
    zero, so that weight decay pulls towards the pretrained weight.
    """

    name: ClassVar[str] = "spectral_r"
    paper: ClassVar[str] = "Spectral Adapter: Fine-Tuning in Spectral Space, arXiv 2405.13952"
    use_when: ClassVar[str] = (
        "Numbers must be few and the singular values stay: small tasks, styles, learning from rewards."
    )
    # The rate of the paper's r = 2 and r = 40 runs on the UNet (section 4.3 settings, r = 8 took 5e-2); small models do
    # best at 1e-2 to 3e-2 (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 1e-2

    least_size: ClassVar[int] = 2

    r: int = option(8, "How many singular directions are rotated among themselves; at least 2.")
    columns: Columns = option(
        "top", 'Which ones: "top", "bottom", "random", a start index in the descending spectrum, or a list.'
    )
    train_singular_values: bool = option(
        False, "Also train c, one relative change for each singular value, as the official code does."
    )

    def __post_init__(self) -> None:
        self._check_share()
        self._at_least(2, r=self.r)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return self.r, self.columns

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> SpectralR:
        return fit_directions(self, rows_O, cols_I, name, least=2)  # one direction has nothing to rotate with

    def shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        triangle = (self.r * (self.r - 1) // 2,)
        shapes: dict[str, tuple[int, ...]] = {"skew_U": triangle, "skew_Vh": triangle}
        return shapes | {"scale": (self.r,)} if self.train_singular_values else shapes

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        if self.columns != "top" and not isinstance(self.columns, int):
            return {}
        larger_C = torch.triu_indices(self.r, self.r, 1)[1] + 1
        sizes = {"skew_U": larger_C, "skew_Vh": larger_C}
        return sizes | {"scale": torch.arange(1, self.r + 1)} if self.train_singular_values else sizes

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        rows_C, cols_C = torch.triu_indices(self.r, self.r, 1)
        places_RR, signs_RR = skew_places(rows_C, cols_C, self.r)
        eye_RR = torch.eye(self.r)
        return {"rows": rows_C, "cols": cols_C, "places": places_RR.flatten(), "signs": signs_RR, "eye": eye_RR}

    def check(self, spectrum: Spectrum) -> None:
        refuse_dead_directions(self.name, spectrum)

    def gradient_axes(self) -> dict[str, int]:
        return {"skew_U": 0, "skew_Vh": 0}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_R = weakness(spectrum)
        plane_C = (weak_R[frozen["rows"]] + weak_R[frozen["cols"]]) / 2
        profile = {"skew_U": plane_C, "skew_Vh": plane_C}
        return profile | {"scale": weak_R} if self.train_singular_values else profile

    def rotations(self, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (R_U, R_V), both R x R orthogonal with determinant one."""
        # 1 - X in two operations, from a table of where each number of the triangle goes. inv_ex and not solve: 1 - X
        # of a skew X always has an inverse, and asking a GPU whether it found one would wait for it, in every layer.
        # No inverse exists in half precision, which a model turned to half as a whole asks for.
        skew_2C = in_single_precision(torch.stack([trained["skew_U"], trained["skew_Vh"]]))
        signs_RR, eye_RR = (frozen[name].to(skew_2C.dtype) for name in ("signs", "eye"))
        if strength != 1.0:
            skew_2C = skew_2C * strength
        X_2RR = skew_2C.index_select(1, frozen["places"]).view(2, self.r, self.r)
        inverse_2RR, _ = torch.linalg.inv_ex(torch.addcmul(eye_RR, X_2RR, signs_RR, value=-1))
        R_U, R_V = torch.lerp(eye_RR, inverse_2RR, 2.0).unbind(0)  # (1 + X)(1 - X)^-1 = 2 (1 - X)^-1 - 1
        return R_U, R_V

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        R_U, R_V = self.rotations(trained, frozen, strength)
        S_R = spectrum.S_R.to(R_U.dtype)
        scaled_R = S_R * (1 + strength * trained["scale"]) if self.train_singular_values else S_R
        core_RR = torch.addmm(torch.diag(S_R), R_U * scaled_R, R_V.T, beta=-1)
        return Delta(spectrum.U_OR, core_RR.to(spectrum.S_R.dtype), spectrum.Vh_RI)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, rows_O, cols_I)


def in_single_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Get a tensor with at least 32 bits for each number."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def skew_places(rows_C: torch.Tensor, cols_C: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Get, for every entry of a skew r x r matrix, the index of its number in the triangle, and its sign (0, 1, -1)."""
    places_RR, signs_RR = torch.zeros(r, r, dtype=torch.long), torch.zeros(r, r)
    numbers_C = torch.arange(len(rows_C))
    places_RR[rows_C, cols_C], signs_RR[rows_C, cols_C] = numbers_C, 1.0
    places_RR[cols_C, rows_C], signs_RR[cols_C, rows_C] = numbers_C, -1.0
    return places_RR, signs_RR

"""SpecAdapt: low-rank coefficients between many frozen singular vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..algebra import scale
from ..errors import OptionError
from ..records import Delta, Spectrum
from .contract import Columns, Method, Tensors, kept_directions, option, weakness


@dataclass(frozen=True, kw_only=True)
class SpecAdapt(Method):
    """Train a matrix of coefficients of rank r in the basis of the top K singular directions.

    dW_OI = U_OK . (A_KR H_RR B_RK) . Vh_KI,   trains 2 K r, and r^2 for H

    A starts at zero, B at a normal distribution of deviation sqrt(1/K) cut at two deviations, H at the
    identity. H is one matrix for the whole model, or one for each weight. Weight dropout drops random rows
    of A, that is whole left singular directions, in each training forward (inverted: the
    mean of the update stays).

    SpecAdapt (Zhang et al.); only the code is public in full. It reshapes each tensor to a near-square
    matrix first, which glues rows of a weight together; here U and Vh are the singular vectors of the
    weight as it maps inputs to outputs. Its dropout masks single entries of the dense update, once a step. Without
    sharing (`shared_core=False`) its update has no H at all; here each weight has an H of its own.
    Its singular-guided decay and gradient normalisation are options of every method, off by default:
    `singular_decay=0.39`, `grad_norm="rms"` or `spectune.attach_dynamics`. It decays A, B and H a second time through
    AdamW's weight decay, and divides gradients far below 1e-4 by 1e-4; here every gradient but zero has rms one
    afterwards. After 100 steps the updates of the two differ by 0.4% to 0.8% where gradients begin at 1e-3, by 4% to 7%
    at 1e-5 and below (benchmarks/results/grad_norm.json: a small problem, whose gradients shrink together).
    """

    name: ClassVar[str] = "specadapt"
    takes_any_directions: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "SpecAdapt, optimizer-level adaptation in a truncated SVD basis (zhangkunzk/SpecAdapt_pytorch)"
    )
    use_when: ClassVar[str] = "Numbers are few but many directions matter; decay can spare the large singular values."
    # The trainer's rate for all nineteen VTAB-1k tasks, with gradients normalised to unit rms; it also suits small
    # models best, without that (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 3e-3

    r: int = option(8, "Inner rank of the coefficients.")
    basis_rank: int | None = option(
        1024, "K, how many top directions are kept (the official max_rank); None is all min(O, I)."
    )
    shared_core: bool = option(
        True, "True: one H for all adapted weights, as in the official code; False: one for each."
    )
    weight_dropout: float = option(
        0.0, "Chance that a left singular direction is left out of a training forward. The official code uses 0.1."
    )

    def __post_init__(self) -> None:
        self._at_least(1, r=self.r, basis_rank=self.basis_rank)
        if not 0.0 <= self.weight_dropout < 1.0:
            raise OptionError(f"specadapt: weight_dropout must be at least 0 and below 1, got {self.weight_dropout!r}.")

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return kept_directions(self.basis_rank, rows_O, cols_I), "top"

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> SpecAdapt:
        # A shared H is r x r for all weights; where a weight has less, A and B bring the update to the rank it allows.
        K = kept_directions(self.basis_rank, rows_O, cols_I)
        return self if self.shared_core or self.r <= K else replace(self, r=K)

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        K = kept_directions(self.basis_rank, rows_O, cols_I)
        shapes: dict[str, tuple[int, ...]] = {"A": (K, self.r), "B": (self.r, K)}
        return shapes if self.shared_core else shapes | {"H": (self.r, self.r)}

    def shared_by(self) -> str:
        return "model" if self.shared_core else ""

    def shared_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {"H": (self.r, self.r)} if self.shared_core else {}

    def start(self, rows_O: int, cols_I: int, seed: int = 0) -> dict[str, torch.Tensor]:
        K = kept_directions(self.basis_rank, rows_O, cols_I)
        B_RK = torch.empty(self.r, K)
        deviation = K**-0.5
        torch.nn.init.trunc_normal_(
            B_RK,
            std=deviation,
            a=-2 * deviation,
            b=2 * deviation,
            generator=torch.Generator().manual_seed(seed),
        )
        return {"A": torch.zeros(K, self.r), "B": B_RK, "H": torch.eye(self.r)}

    def disturb(self, trained: Tensors) -> Tensors:
        if self.weight_dropout == 0.0:
            return trained
        A_KR = trained["A"]
        keep_K = torch.nn.functional.dropout(A_KR.new_ones(A_KR.shape[0], 1), self.weight_dropout)
        return {**trained, "A": A_KR * keep_K}

    def gradient_axes(self) -> dict[str, int]:
        return {"A": 0, "B": 1}

    def matrix_steps(self) -> dict[str, str]:
        # B starts with singular values near one, H at the identity.
        return {"A": "weight", "B": "one", "H": "one"}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_K = weakness(spectrum)
        return {"A": weak_K[:, None], "B": weak_K[None, :]}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        left_OR = spectrum.U_OR @ trained["A"]
        right_RI = trained["B"] @ spectrum.Vh_RI
        whole = Delta(left_OR, trained["H"], right_RI)
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.r, rows_O, cols_I)

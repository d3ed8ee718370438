"""SVFT: a sparse or dense matrix of coefficients between frozen singular vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..algebra import scale
from ..errors import AdapterError, OptionError, WeightError, nearest
from ..records import Delta, SparseCore, Spectrum
from .contract import Columns, Tensors, Tied, kept_directions, option, weakness
from .svft_places import CHOSEN, PATTERNS, line_length

DENSE = "dense"
"""The pattern without places: M is a plain matrix."""


@dataclass(frozen=True, kw_only=True)
class SVFT(Tied):
    """Train k coefficients m_ij of fixed rank-one terms u_i v_j^T.

    dW_OI = U_OK . M_KK . Vh_KI,   M zero outside a pattern fixed before training

    Patterns on K kept directions: `plain`, the diagonal (k = K); `banded`, |i - j| <= d
    (k = K(2d + 1) - d(d + 1)); `random`, as many places as banded, drawn without replacement;
    `top_k`, as many places as banded with the largest |u_i . v_j|, which only exists for square weights;
    `chosen`, the k places with the largest Fisher information E[(u_i^T G v_j)^2] over the gradients G of some batches
    (`spectune.prepare`), `places` of them or as many as banded;
    `dense`, all of them (k = K^2), or with `core` a P x Q matrix of its own between the top P left and the top Q right
    directions. It equals a band of K - 1 off-diagonals, and is stored and multiplied as a plain matrix.

    `full_basis` takes the full SVD: U is O x O, Vh I x I, M O x I, as the paper writes it. Only then
    can a dense M (a band as wide as the weight) reach every matrix when O and I differ (Lemma (b)).
    The base weight keeps what a truncated basis leaves out: only the update is confined to it.

    SVFT (Lingam et al., arXiv 2405.19597), section 3; their M, d, k are ours. Thin by default, as their
    code is: U O x K and Vh K x I. Unlike their code M starts at zero, `random` never
    draws a place twice, `top_k` scores |U^T Vh^T| (theirs the signed product U Vh^T), and the gate
    sigmoid(g), which the paper does not mention, is off by default.
    """

    name: ClassVar[str] = "svft"
    takes_any_directions: ClassVar[bool] = True
    paper: ClassVar[str] = "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv 2405.19597"
    use_when: ClassVar[str] = (
        "You want the highest accuracy measured here (dense cores in the directions of your data), or the "
        "fewest numbers (plain)."
    )
    # Between the paper's 5e-2 for plain M (tables 11-14) and its 1e-3 to 1e-2 for banded and random patterns; a band on
    # small models does best at 1e-2 and little worse at this (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 3e-2

    basis_rank: int | None = option(None, "How many top directions M works in; None is all K = min(O, I).")
    pattern: str = option("plain", "`plain`, `banded`, `random`, `top_k`, `chosen` or `dense`.")
    core: tuple[int, ...] | None = option(
        None, "[P, Q]: a `dense` M between the top P left and the top Q right directions; in place of basis_rank."
    )
    off_diagonals: int | None = option(
        None,
        "d: off-diagonals on each side of a `banded` M; `random`, `top_k` and `chosen` use as many places. Default 2.",
    )
    places: int | None = option(None, "k: how many places a `chosen` M trains; in place of off_diagonals.")
    pattern_seed: int = option(0, "Seed of the `random` pattern; the same for every layer, and kept in the file.")
    full_basis: bool = option(False, "Complete the thin basis of a rectangular weight to the full SVD.")
    gate: bool = option(False, "Multiply M by sigmoid(g) with one trained g per layer, as the official code does.")

    def __post_init__(self) -> None:
        self._check_share()
        self._at_least(1, basis_rank=self.basis_rank, places=self.places)
        self._at_least(0, off_diagonals=self.off_diagonals, pattern_seed=self.pattern_seed)
        known = [*PATTERNS, DENSE]
        if self.pattern not in known:
            raise OptionError(f"svft: unknown pattern {self.pattern!r}. {nearest(str(self.pattern), known)}")
        if self.share != "none" and self.pattern in ("top_k", CHOSEN):
            raise OptionError(
                f"svft: share={self.share!r} does not go with pattern={self.pattern!r}, which takes other places in "
                "each weight. Use another pattern, or leave share out."
            )
        if self.pattern in ("plain", DENSE) and self.off_diagonals:
            raise OptionError(
                f"svft: off_diagonals={self.off_diagonals} has no effect on pattern={self.pattern!r}. Use "
                "pattern='banded' or leave off_diagonals out."
            )
        if self.full_basis and self.basis_rank is not None:
            raise OptionError(
                f"svft: full_basis does not go with basis_rank={self.basis_rank}, which cuts the basis. Leave one of "
                "them out."
            )
        self._check_core()
        self._check_places()

    def _check_core(self) -> None:
        if self.core is None:
            return
        sizes = self.core if isinstance(self.core, tuple) else ()
        if len(sizes) != 2 or not all(type(size) is int and size >= 1 for size in sizes):
            raise OptionError(f"svft: core={self.core!r} must be two integers of at least 1, as in core=[96, 64].")
        others = {"basis_rank": self.basis_rank, "full_basis": self.full_basis or None}
        given = [name for name, value in others.items() if value is not None]
        if self.pattern != DENSE or given:
            reason = f"the size is in {given[0]} already" if given else f"pattern={self.pattern!r} has no such sizes"
            raise OptionError(f"svft: core={list(sizes)} only goes with pattern='dense' alone; {reason}. Leave it out.")

    def _check_places(self) -> None:
        if self.places is not None and (self.pattern != CHOSEN or self.off_diagonals is not None):
            reason = f"pattern={self.pattern!r}" if self.pattern != CHOSEN else f"off_diagonals={self.off_diagonals}"
            raise OptionError(
                f"svft: places={self.places} only goes with pattern='chosen', without off_diagonals, and there is "
                f"{reason}. Leave one of them out."
            )
        if self.pattern == CHOSEN and self.full_basis:
            raise OptionError("svft: full_basis does not go with pattern='chosen'. Leave full_basis out.")

    @property
    def d(self) -> int:
        """Off-diagonals a side; 2 is the smallest that the paper reports (GLUE R_2, vision B_2)."""
        if self.pattern == "plain":
            return 0
        return 2 if self.off_diagonals is None else self.off_diagonals

    def usual_rate(self) -> float:
        """For a dense core of P x Q numbers .03 / (P Q)^(1/4): the rate of single coefficients, .03, at P = Q = 1.

        It lies within a quarter decade of what was best on validation, one seed, in the gradient's directions of
        MiniLM's weights: 3e-3 for 78 x 78 (one task); 7e-3 for 17 x 17 on every layer, where 1.4e-2 lost 1.8 and 3.6
        points on two tasks; 5e-3 and 1e-2 alike for 24 x 24 on query, key and value (docs/results.md). No run was made
        at exactly this rate. Never less than 1e-3, which is also for a core of unknown size: chosen.
        """
        P, Q = self.core or (self.basis_rank, self.basis_rank)
        if self.pattern != DENSE or self.full_basis:
            return self.learning_rate
        return 1e-3 if P is None or Q is None else max(1e-3, self.learning_rate / (P * Q) ** 0.25)

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        most = self.basis_rank if self.core is None else max(self.core)
        return kept_directions(most, rows_O, cols_I), "top"

    def core_shape(self, rows_O: int, cols_I: int) -> tuple[int, int]:
        """Get (P, Q), the shape of M."""
        if self.full_basis:
            return rows_O, cols_I
        P, Q = (self.basis_rank, self.basis_rank) if self.core is None else self.core
        return kept_directions(P, rows_O, cols_I), kept_directions(Q, rows_O, cols_I)

    def coefficients(self, rows_O: int, cols_I: int) -> int:
        """Get k, the number of trained coefficients (without the gate)."""
        P, Q = self.core_shape(rows_O, cols_I)
        if self.pattern == DENSE:
            return P * Q
        if self.places is not None:
            if self.places > P * Q:
                raise WeightError(
                    f"svft: places={self.places} is more than this {rows_O}x{cols_I} weight has with {P} directions "
                    f"({P * Q}). Lower places, or exclude the layer."
                )
            return self.places
        return sum(line_length(offset, P, Q) for offset in range(-self.d, self.d + 1))

    def shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        dense = self.pattern == DENSE
        one: tuple[int, ...] = self.core_shape(rows_O, cols_I) if dense else (self.coefficients(rows_O, cols_I),)
        shapes = {"M": one}
        return shapes | {"gate": (1,)} if self.gate else shapes

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        rest = (
            {"U_rest": complement(spectrum.U_OR), "Vh_rest": complement(spectrum.Vh_RI.T).T} if self.full_basis else {}
        )
        if self.pattern in ("plain", DENSE):
            return rest
        rows_O, cols_I, _ = spectrum.shape
        rows_C, cols_C = PATTERNS[self.pattern](self, spectrum, self.coefficients(rows_O, cols_I))
        return {"rows": rows_C, "cols": cols_C, **rest}

    def saves_frozen(self) -> bool:
        # Near ties in |U^T Vh^T| may fall the other way on another machine, so the places travel.
        # Those of `chosen` cannot be found again without the data.
        return self.pattern in ("top_k", CHOSEN)

    def needs_examples(self) -> bool:
        return self.pattern == CHOSEN

    def candidates(self) -> SVFT:
        if self.pattern != CHOSEN:
            return self
        return replace(self, pattern=DENSE, places=None, off_diagonals=None, gate=False)

    def size_option(self) -> str | None:
        if self.pattern == CHOSEN:
            return "places"
        return "basis_rank" if self.core is None and not self.full_basis else None

    def sized(self, size: int) -> SVFT:
        sized: Any = super().sized(size) if self.pattern != CHOSEN else replace(self, places=size, off_diagonals=None)
        return sized

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        place_K = torch.arange(1, min(self.core_shape(rows_O, cols_I)) + 1)
        known = {DENSE: torch.maximum(place_K[:, None], place_K), "plain": place_K, CHOSEN: place_K}
        if self.pattern not in known or self.size_option() is None:
            return {}
        return {"M": known[self.pattern]} | ({"gate": torch.ones(1, dtype=torch.long)} if self.gate else {})

    def offer(self, rows_O: int, cols_I: int, scores: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pattern != CHOSEN:
            return super().offer(rows_O, cols_I, scores)
        best_first = scores["M"].double().cpu().flatten().sort(descending=True).values
        costs = torch.ones(len(best_first), dtype=torch.long)
        costs[0] += self.gate
        return best_first, costs

    def chosen(self, spectrum: Spectrum, scores: Tensors) -> Spectrum:
        rows_O, cols_I, _ = spectrum.shape
        best_first = scores["M"].flatten().argsort(descending=True, stable=True)
        return replace(spectrum, places=best_first[: self.coefficients(rows_O, cols_I)].clone())

    def large_frozen(self) -> tuple[str, ...]:
        return ("U_rest", "Vh_rest") if self.full_basis else ()

    def check_frozen(self, spectrum: Spectrum, frozen: Tensors) -> None:
        if "rows" not in frozen:
            return
        P, Q = self.core_shape(*spectrum.shape[:2])
        rows_C, cols_C = frozen["rows"].long(), frozen["cols"].long()
        inside = bool(((rows_C >= 0) & (rows_C < P) & (cols_C >= 0) & (cols_C < Q)).all())
        if not inside or len(torch.unique(rows_C * Q + cols_C)) < len(rows_C):
            raise AdapterError(
                f"{spectrum.name}: the saved pattern has places outside of the {P}x{Q} core, or one twice. "
                f"Copy it again."
            )

    def is_linear(self) -> bool:
        return not self.gate

    def gradient_axes(self) -> dict[str, int | tuple[int, ...]]:
        return {"M": (0, 1) if self.pattern == DENSE else 0}

    def matrix_steps(self) -> dict[str, str]:
        return {"M": "weight"} if self.pattern == DENSE else {}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_K = weakness(spectrum)
        if self.pattern == "plain":
            return {"M": weak_K}
        # Directions beyond the thin basis (full_basis) have singular value zero: full decay.
        padded = torch.nn.functional.pad(weak_K, (0, max(spectrum.shape[:2]) - len(weak_K)), value=1.0)
        if self.pattern == DENSE:
            P, Q = self.core_shape(*spectrum.shape[:2])
            return {"M": (padded[:P, None] + padded[:Q]) / 2}
        return {"M": (padded[frozen["rows"]] + padded[frozen["cols"]]) / 2}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        values = trained["M"] * torch.sigmoid(trained["gate"]) if self.gate else trained["M"]
        left_OP, right_QI = spectrum.U_OR, spectrum.Vh_RI
        if self.pattern == "plain":
            whole = Delta(left_OP, values, right_QI)
        else:
            if self.full_basis:
                left_OP = torch.cat([left_OP, frozen["U_rest"].to(left_OP.dtype)], dim=1)
                right_QI = torch.cat([right_QI, frozen["Vh_rest"].to(right_QI.dtype)])
            P, Q = self.core_shape(left_OP.shape[0], right_QI.shape[1])
            if left_OP.shape[1] != P or right_QI.shape[0] != Q:
                left_OP, right_QI = left_OP[:, :P], right_QI[:Q]
            core = values if self.pattern == DENSE else SparseCore(frozen["rows"], frozen["cols"], values, (P, Q))
            whole = Delta(left_OP, core, right_QI)
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        P, Q = self.core_shape(rows_O, cols_I)
        return min(P, Q, self.coefficients(rows_O, cols_I)) if self.pattern == CHOSEN else min(P, Q)


def complement(U_OR: torch.Tensor) -> torch.Tensor:
    """Get O - R orthonormal columns orthogonal to the R given ones, shape O x (O - R).

    A fixed Gaussian is projected out of span(U) and orthonormalised, so the result depends only on that
    span and not on which of its bases a solver returned: files need not store it.
    """
    rows_O, R = U_OR.shape
    gaussian = torch.from_numpy(np.random.RandomState(0).standard_normal((rows_O, rows_O - R))).to(U_OR)
    projected = gaussian - U_OR @ (U_OR.T @ gaussian)
    unit, upper = torch.linalg.qr(projected - U_OR @ (U_OR.T @ projected))
    return unit * torch.sign(upper.diagonal())

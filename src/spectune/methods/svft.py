"""SVFT: a sparse matrix of coefficients between frozen singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..algebra import scale
from ..errors import AdapterError, OptionError, WeightError, nearest
from ..records import Delta, SparseCore, Spectrum
from .contract import Columns, Method, Tensors, kept_directions, option, weakness


@dataclass(frozen=True, kw_only=True)
class SVFT(Method):
    """Train k coefficients m_ij of fixed rank-one terms u_i v_j^T.

    dW_OI = U_OK . M_KK . Vh_KI,   M zero outside a pattern fixed before training

    Patterns on K kept directions: `plain`, the diagonal (k = K); `banded`, |i - j| <= d
    (k = K(2d + 1) - d(d + 1)); `random`, as many places as banded, drawn without replacement;
    `top_k`, as many places as banded with the largest |u_i . v_j|, which only exists for square weights.

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
    # Between the paper's 5e-2 for plain M (tables 11-14) and its 1e-3 to 1e-2 for banded and random patterns; a band on
    # small models does best at 1e-2 and little worse at this (benchmarks/results/rates.json).
    learning_rate: ClassVar[float] = 3e-2

    basis_rank: int | None = option(None, "How many top directions M works in; None is all K = min(O, I).")
    pattern: str = option("plain", "`plain`, `banded`, `random` or `top_k`.")
    off_diagonals: int | None = option(
        None, "d: off-diagonals on each side of a `banded` M; `random` and `top_k` use as many places. Default 2."
    )
    pattern_seed: int = option(0, "Seed of the `random` pattern; the same for every layer, and kept in the file.")
    full_basis: bool = option(False, "Complete the thin basis of a rectangular weight to the full SVD.")
    gate: bool = option(False, "Multiply M by sigmoid(g) with one trained g per layer, as the official code does.")

    def __post_init__(self) -> None:
        self._at_least(1, basis_rank=self.basis_rank)
        self._at_least(0, off_diagonals=self.off_diagonals, pattern_seed=self.pattern_seed)
        if self.pattern not in PATTERNS:
            raise OptionError(f"svft: unknown pattern {self.pattern!r}. {nearest(self.pattern, list(PATTERNS))}")
        if self.pattern == "plain" and self.off_diagonals:
            raise OptionError(
                f"svft: off_diagonals={self.off_diagonals} has no effect on pattern='plain'. Use pattern='banded' or "
                "leave off_diagonals out."
            )

        if self.full_basis and self.basis_rank is not None:
            raise OptionError(
                f"svft: full_basis does not go with basis_rank={self.basis_rank}, which cuts the basis. Leave one of "
                "them out."
            )

    @property
    def d(self) -> int:
        """Off-diagonals a side; 2 is the smallest that the paper reports (GLUE R_2, vision B_2)."""
        if self.pattern == "plain":
            return 0
        return 2 if self.off_diagonals is None else self.off_diagonals

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        return kept_directions(self.basis_rank, rows_O, cols_I), "top"

    def core_shape(self, rows_O: int, cols_I: int) -> tuple[int, int]:
        """Get (P, Q), the shape of M."""
        K = kept_directions(self.basis_rank, rows_O, cols_I)
        return (rows_O, cols_I) if self.full_basis else (K, K)

    def coefficients(self, rows_O: int, cols_I: int) -> int:
        """Get k, the number of trained coefficients (without the gate)."""
        P, Q = self.core_shape(rows_O, cols_I)
        return sum(_line_length(offset, P, Q) for offset in range(-self.d, self.d + 1))

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"M": (self.coefficients(rows_O, cols_I),)}
        return shapes | {"gate": (1,)} if self.gate else shapes

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        rest = (
            {"U_rest": complement(spectrum.U_OR), "Vh_rest": complement(spectrum.Vh_RI.T).T} if self.full_basis else {}
        )
        if self.pattern == "plain":
            return rest
        rows_O, cols_I, _ = spectrum.shape
        rows_C, cols_C = PATTERNS[self.pattern](self, spectrum, self.coefficients(rows_O, cols_I))
        return {"rows": rows_C, "cols": cols_C, **rest}

    def saves_frozen(self) -> bool:
        # Near ties in |U^T Vh^T| may fall the other way on another machine, so the places travel.
        return self.pattern == "top_k"

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

    def gradient_axes(self) -> dict[str, int]:
        return {"M": 0}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        weak_K = weakness(spectrum)
        if self.pattern == "plain":
            return {"M": weak_K}
        # Directions beyond the thin basis (full_basis) have singular value zero: full decay.
        padded = torch.nn.functional.pad(weak_K, (0, max(spectrum.shape[:2]) - len(weak_K)), value=1.0)
        return {"M": (padded[frozen["rows"]] + padded[frozen["cols"]]) / 2}

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        values_C = trained["M"] * torch.sigmoid(trained["gate"]) if self.gate else trained["M"]
        left_OP, right_QI = spectrum.U_OR, spectrum.Vh_RI
        if self.pattern == "plain":
            whole = Delta(left_OP, values_C, right_QI)
        else:
            if self.full_basis:
                left_OP = torch.cat([left_OP, frozen["U_rest"].to(left_OP.dtype)], dim=1)
                right_QI = torch.cat([right_QI, frozen["Vh_rest"].to(right_QI.dtype)])
            shape = (left_OP.shape[1], right_QI.shape[0])
            whole = Delta(left_OP, SparseCore(frozen["rows"], frozen["cols"], values_C, shape), right_QI)
        return whole if strength == 1.0 else scale(whole, strength)

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        return min(self.core_shape(rows_O, cols_I))


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


Places = tuple[torch.Tensor, torch.Tensor]


def _line_length(offset: int, P: int, Q: int) -> int:
    """Get how many entries the diagonal j - i = offset of a P x Q matrix has."""
    return max(min(P, Q - offset) if offset >= 0 else min(P + offset, Q), 0)


def _plain(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    diagonal_K = torch.arange(count)
    return diagonal_K, diagonal_K


def _banded(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    P, Q = method.core_shape(*spectrum.shape[:2])
    rows, cols = [], []
    for offset in range(-method.d, method.d + 1):
        line = torch.arange(_line_length(offset, P, Q))
        rows.append(line + max(-offset, 0))
        cols.append(line + max(offset, 0))
    return torch.cat(rows), torch.cat(cols)


def _random(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    """Draw `count` of the P * Q places without replacement.

    From numpy's RandomState, whose stream is frozen (NEP 19): its seed gives the same pattern
    on any machine and in any later version, so the file need not store it.
    """
    P, Q = method.core_shape(*spectrum.shape[:2])
    stream = np.random.RandomState(method.pattern_seed)
    flat_C = np.empty(0, dtype=np.int64)
    while len(flat_C) < count:
        drawn = np.concatenate([flat_C, stream.randint(0, P * Q, size=count, dtype=np.int64)])
        first = np.sort(np.unique(drawn, return_index=True)[1])
        flat_C = drawn[first][:count]
    flat = torch.from_numpy(np.sort(flat_C))
    return flat // Q, flat % Q


def _top_k(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    rows_O, cols_I, K = spectrum.shape
    if rows_O != cols_I:
        raise WeightError(
            f"{spectrum.name or 'weight'}: pattern='top_k' compares u_i with v_j, so it needs a square weight; this "
            f"one is {rows_O}x{cols_I}. Use 'banded' or 'random', or exclude the layer."
        )
    alignment_KK = (spectrum.U_OR.T @ spectrum.Vh_RI.T).abs()
    flat = alignment_KK.flatten().topk(count).indices.sort().values
    return flat // K, flat % K


PATTERNS: dict[str, Callable[[SVFT, Spectrum, int], Places]] = {
    "plain": _plain,
    "banded": _banded,
    "random": _random,
    "top_k": _top_k,
}

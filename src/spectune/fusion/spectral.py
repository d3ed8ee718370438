"""The union of tuned singular directions: the Spectral Adapter's own fusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import torch

from ..errors import AdapterError
from ..methods import Method
from ..records import Quality, Spectrum, Weight
from ..spectrum import decompose
from .contract import Fusion, Part

# |<u, u'>| of what two adapters call the same column. On one base it is 1 up to rounding, unless singular values
# repeat and the two found different mixtures; then adding their numbers means nothing. Chosen.
SAME_DIRECTION = 0.99
METHOD = "spectral_a"


@dataclass(frozen=True, kw_only=True)
class Spectral(Fusion):
    """Put the tuned directions of all adapters side by side; the result is again a `spectral_a` adapter.

    W' = (U + sum_i l_i A_U,i) diag(S) (Vh + sum_i l_i A_Vh,i), every A_i zero outside its own columns
    dW = sum_i [ l_i (A_U,i S Vh + U S A_Vh,i) + l_i^2 A_U,i S A_Vh,i ]   when no column is shared

    S is diagonal, so disjoint columns have no cross terms. l_i = 1/N is the paper's choice, and every concept keeps
    about 1/N of its strength; l_i = 1 keeps every concept's tuned columns exactly, dW = sum_i dW_i. Disjoint means
    disjoint in columns: concepts still share the entries of W and the activations. On a shared column
    (`allow_overlap`) the numbers of the adapters add up, which brings cross terms l_i l_j A_U,i S A_Vh,j. Adapters that
    train singular values have S + sum_i l_i C_i in place of S.

    Spectral Adapter (Zhang & Pilanci, arXiv 2405.13952), on adapter fusion. Its published code averages the merged
    weights, which agrees only to first order: the last term is then divided by N instead of N^2.
    """

    name: ClassVar[str] = "spectral"
    paper: ClassVar[str] = "Spectral Adapter: Fine-Tuning in Spectral Space, arXiv 2405.13952"

    allow_overlap: bool = False
    """Go on if adapters tuned the same column; their numbers there are added."""

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        bases = [_basis_of(part) for part in parts]
        for first, second in combinations(parts, 2):
            if not self.allow_overlap:
                _refuse_shared_columns(first, second)
        columns = tuple(sorted({column for basis in bases for column in basis.columns}))
        rows_O, cols_I = parts[0].delta.shape
        union, trained = _empty(rows_O, cols_I, columns, parts)
        filled: set[int] = set()
        for part, basis, weight in zip(parts, bases, weights, strict=True):
            for own, column in enumerate(basis.columns):
                place = columns.index(column)
                sign = _put(union, place, basis, own, part) if column in filled else _fill(union, place, basis, own)
                for name, axis in _axes(part).items():
                    # A singular value keeps its sign when both its vectors turn.
                    turn = sign if trained[name].ndim > 1 else 1.0
                    trained[name].select(axis, place).add_(part.trained[name].select(axis, own), alpha=weight * turn)
                filled.add(column)
        return _spectral_part(parts, union, trained)


def pad(part: Part, columns: Sequence[int], W_OI: torch.Tensor) -> Part:
    """Get the same update over more columns: the new directions come from the weight, their numbers are zero."""
    assert part.basis is not None
    missing = [column for column in columns if column not in part.columns]
    if not missing:
        return part
    found = decompose(Weight(part.layer, W_OI), len(missing), columns=missing, dtype=torch.float64)
    rows_O, cols_I = part.delta.shape
    union, trained = _empty(rows_O, cols_I, tuple(columns), [part])
    for place, column in enumerate(columns):
        source, own = (found, missing.index(column)) if column in missing else (part.basis, part.columns.index(column))
        _fill(union, place, source, own)
        if column not in missing:
            for name, axis in _axes(part).items():
                trained[name].select(axis, place).copy_(part.trained[name].select(axis, own))
    return _spectral_part([part], union, trained)


def _basis_of(part: Part) -> Spectrum:
    if part.method is None or part.method.name != METHOD or part.basis is None:
        found = "a LoRA" if part.method is None else part.method.name
        raise AdapterError(
            f"{part.layer}: rule 'spectral' only takes spectral_a adapters, but {part.adapter} is {found}. Use "
            "rule='average' or rule='gradient'."
        )
    return part.basis


def _refuse_shared_columns(first: Part, second: Part) -> None:
    shared = sorted(set(first.columns) & set(second.columns))
    if shared:
        shown = ", ".join(map(str, shared[:8])) + (", …" if len(shared) > 8 else "")
        raise AdapterError(
            f"{first.layer}: {first.adapter} and {second.adapter} both tuned the singular columns {shown}, where their "
            "numbers would add up and mix. Train on disjoint columns (spectune schedule), or pass --allow-overlap."
        )


def _empty(
    rows_O: int, cols_I: int, columns: tuple[int, ...], parts: Sequence[Part]
) -> tuple[Spectrum, dict[str, torch.Tensor]]:
    R, like = len(columns), parts[0].delta.left_OP
    quality = Quality(solver="fused", residual=0.0, orthogonality=0.0, gap=float("inf"))
    union = Spectrum(
        like.new_zeros(rows_O, R), like.new_zeros(R), like.new_zeros(R, cols_I), columns, quality, parts[0].layer
    )
    shapes = method_on(columns, parts).trained_shapes(rows_O, cols_I)
    return union, {name: like.new_zeros(shape) for name, shape in shapes.items()}


def method_on(columns: tuple[int, ...], parts: Sequence[Part]) -> Method:
    """Get spectral_a on these columns, with the options of the adapter that trains most kinds of numbers."""
    return replace(richest(parts), r=len(columns), columns=columns)  # type: ignore[call-arg]


def richest(parts: Iterable[Part]) -> Method:
    """Get the method of the adapter that trains most kinds of numbers; what the others lack of them is zero."""
    methods = [part.method for part in parts if part.method is not None]
    return max(methods, key=lambda method: len(method.direction_axes()))


def _axes(part: Part) -> dict[str, int]:
    """Get along which axis of each trained tensor the directions lie."""
    assert part.method is not None
    return part.method.direction_axes()


def _fill(union: Spectrum, place: int, basis: Spectrum, own: int) -> float:
    union.U_OR[:, place], union.S_R[place], union.Vh_RI[place] = basis.U_OR[:, own], basis.S_R[own], basis.Vh_RI[own]
    return 1.0


def _put(union: Spectrum, place: int, basis: Spectrum, own: int, part: Part) -> float:
    """Get the sign that maps an adapter's direction to the one already there; `AdapterError` if they differ."""
    left = float(union.U_OR[:, place] @ basis.U_OR[:, own])
    right = float(union.Vh_RI[place] @ basis.Vh_RI[own])
    if min(abs(left), abs(right)) < SAME_DIRECTION or left * right < 0:
        raise AdapterError(
            f"{part.layer}: column {basis.columns[own]} of {part.adapter} is not the same direction as in the other "
            f"adapters (cosines {left:.2f}, {right:.2f}), so the numbers cannot be added. Use rule='average'."
        )
    return 1.0 if left > 0 else -1.0


def _spectral_part(parts: Sequence[Part], union: Spectrum, trained: dict[str, torch.Tensor]) -> Part:
    method = method_on(union.columns, parts)
    delta = method.delta(union, trained, {})
    return replace(parts[0], adapter="fused", delta=delta, method=method, basis=union, trained=trained, gram_II=None)

"""How much the updates of several adapters overlap, layer by layer, computed from their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch

from ..methods import Method
from .compact import Compact, compact, inner
from .contract import Part


@dataclass(frozen=True)
class PairOverlap:
    """Two adapters in one layer. All shares run from 0 (apart) to 1 (the same)."""

    layer: str
    first: str
    second: str
    shared_columns: tuple[int, ...]
    """Singular columns that both tuned."""
    cosine: float
    """<dW_1, dW_2> / (|dW_1| |dW_2|): how much of the other update each contains; the sign says whether they agree."""
    output_angle: float
    """Smallest principal angle between the two column spaces, in degrees; 90 if they write into separate outputs."""
    input_angle: float
    """Smallest principal angle between the two row spaces, in degrees; 90 if no input reaches both."""
    output_cross: float
    """|dW_1^T dW_2|_F / (|dW_1| |dW_2|): how much both write into the same outputs."""
    input_cross: float
    """|dW_1 dW_2^T|_F / (|dW_1| |dW_2|): how much both read the same inputs."""
    spectral_cross: float
    """|A_U,1 S A_Vh,2 + A_U,2 S A_Vh,1|_F over the shared columns, as a share of |dW_1 + dW_2|_F: the cross
    terms that the spectral rule adds at l = 1. Zero if no column is shared, and for other methods."""


@dataclass(frozen=True)
class LayerOverlap:
    """One layer after fusing."""

    layer: str
    rank: int
    """Rank of the fused update, and so of a LoRA that holds it."""
    kept: dict[str, float]
    """Adapter -> <fused, dW_i> / |dW_i|^2, its remaining strength: 1 is all, 1/N the usual average."""


@dataclass(frozen=True)
class OverlapReport:
    """What fusing did and what it cost, in plain numbers."""

    rule: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    base: str
    """How far the check went that all adapters have one base."""
    pairs: tuple[PairOverlap, ...]
    layers: tuple[LayerOverlap, ...]
    kept: dict[str, float]
    """Adapter -> its remaining strength over all layers together."""
    why: str = ""
    """Why rule="auto" took this rule."""

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        return asdict(self)


def pair_overlaps(parts: Sequence[Part]) -> list[PairOverlap]:
    """Get the overlap of every two adapters in one layer."""
    return [_overlap(one, other) for one, other in combinations(parts, 2)]


def _overlap(one: Part, other: Part) -> PairOverlap:
    first, second = one.compact, other.compact
    outputs_Pp, inputs_Pp = first.X_OP.mT @ second.X_OP, first.Yh_PI @ second.Yh_PI.mT
    sizes = first.size * second.size or 1.0
    weigh_Pp = first.S_P[:, None] * second.S_P
    product = float((weigh_Pp * outputs_Pp * inputs_Pp).sum())  # <dW_1, dW_2>
    return PairOverlap(
        one.layer,
        one.adapter,
        other.adapter,
        tuple(sorted(set(one.columns) & set(other.columns))),
        product / sizes,
        _smallest_angle(outputs_Pp),
        _smallest_angle(inputs_Pp),
        float(torch.linalg.vector_norm(weigh_Pp * outputs_Pp)) / sizes,
        float(torch.linalg.vector_norm(weigh_Pp * inputs_Pp)) / sizes,
        _spectral_cross(one, other, math.sqrt(max(first.size**2 + second.size**2 + 2 * product, 0.0))),
    )


def _smallest_angle(cosines_Pp: torch.Tensor) -> float:
    if 0 in cosines_Pp.shape:
        return 90.0  # an update of zero meets nobody
    return math.degrees(math.acos(min(1.0, float(torch.linalg.matrix_norm(cosines_Pp, ord=2)))))


def _spectral_cross(one: Part, other: Part, size: float) -> float:
    """Get the size of the terms of (U + A_1 + A_2) S (Vh + B_1 + B_2) that are in neither update."""
    shared = sorted(set(one.columns) & set(other.columns))
    if one.method is None or other.method is None or one.method.name != other.method.name or not shared or not size:
        return 0.0
    assert one.basis is not None and other.basis is not None
    mine, yours = ([basis.columns.index(c) for c in shared] for basis in (one.basis, other.basis))
    basis = replace(
        one.basis,
        U_OR=one.basis.U_OR[:, mine], S_R=one.basis.S_R[mine], Vh_RI=one.basis.Vh_RI[mine], columns=tuple(shared),
    )  # fmt: skip
    # The two may hold a direction with opposite signs; then so are the numbers along it.
    signs_R = torch.sign((basis.U_OR * other.basis.U_OR[:, yours]).sum(0))
    # What one of them trains and the other does not (the singular values) is zero there.
    method = max((one.method, other.method), key=lambda method: len(method.direction_axes()))
    first, second = (_along(part, chosen, method) for part, chosen in ((one, mine), (other, yours)))
    for name, axis in method.direction_axes().items():
        if second[name].ndim > 1:  # a singular value keeps its sign when both its vectors turn
            second[name] = second[name] * (signs_R if axis else signs_R[:, None])
    cross = method.cross_terms(basis, first, second)
    return 0.0 if cross is None else compact(cross).size / size


def _along(part: Part, chosen: list[int], method: Method) -> dict[str, torch.Tensor]:
    """Get the trained numbers of these directions; zeros for those that only the other adapter trains."""
    found = {}
    for name, axis in method.direction_axes().items():
        like = part.trained.get(name)
        if like is None:
            like = part.delta.left_OP.new_zeros(method.trained_shapes(*part.delta.shape)[name])
        found[name] = like.index_select(axis, torch.tensor(chosen))
    return found


def kept_strengths(parts: Sequence[Part], fused: Compact) -> dict[str, tuple[float, float]]:
    """Get adapter -> (<fused, dW_i>, |dW_i|^2) in one layer."""
    return {part.adapter: (inner(fused, part.compact), part.compact.size**2) for part in parts}

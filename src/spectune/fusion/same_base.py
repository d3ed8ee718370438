"""Whether adapters belong to one base model, as far as their files can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch

from ..errors import AdapterError
from ..records import Spectrum
from .contract import Part

# How near two embedded bases come to those of two unrelated weights (1). Columns of one weight are orthogonal: 1e-4
# and less; a bfloat16 copy turns neighbours into each other, about 0.1. Chosen in between.
MOST_FOREIGN = 0.3


def check_same_base(parts: Sequence[Part]) -> float:
    """Get the misfit of the bases of one layer, from 0 to 1; `AdapterError` if they do not match.

    Shapes are always compared, singular directions if the adapters have them.
    """
    first, worst = parts[0], 0.0
    for part in parts[1:]:
        if part.delta.shape != first.delta.shape:
            shapes = " and ".join(f"{p.delta.shape[0]}x{p.delta.shape[1]} in {p.adapter}" for p in (first, part))
            raise AdapterError(
                f"{part.layer}: the weight is {shapes}, so these adapters have different bases. Fuse adapters of one "
                "base."
            )
    for one, other in combinations(parts, 2):
        if one.basis is None or other.basis is None:
            continue
        share = foreign_share(one.basis, other.basis)
        if not share <= MOST_FOREIGN:
            raise AdapterError(
                f"{one.layer}: the singular directions of {one.adapter} and {other.adapter} come from different "
                f"weights (misfit {share:.0%}; unrelated weights give 100%, rounding at most {MOST_FOREIGN:.0%}). Fuse "
                "adapters of one base."
            )
        worst = max(worst, share)
    return worst


def foreign_share(one: Spectrum, other: Spectrum) -> float:
    """Get the misfit of two sets of columns of one weight: 0 for a perfect fit, about 1 for unrelated weights.

    Different columns must be orthogonal (the root mean square of <u_i, u_j>, in units of 1/sqrt(O), what random
    directions give), and shared columns must span the same space (one minus the mean squared cosine). The larger of the
    two, the mean of both sides. A rotation inside the shared columns is not counted: equal singular values allow it.
    """
    shared = sorted(set(one.columns) & set(other.columns))
    places = [one.columns.index(c) for c in shared], [other.columns.index(c) for c in shared]
    apart_RR = torch.ones(len(one.columns), len(other.columns), dtype=torch.bool)
    if shared:
        apart_RR[torch.tensor(places[0])[:, None], torch.tensor(places[1])] = False
    shares = []
    for cosines_RR, width in ((one.U_OR.mT @ other.U_OR, one.shape[0]), (one.Vh_RI @ other.Vh_RI.mT, one.shape[1])):
        share = 0.0
        if bool(apart_RR.any()):
            share = math.sqrt(width * float(cosines_RR[apart_RR].square().mean()))
        if shared:
            share = max(share, 1 - float(cosines_RR[~apart_RR].square().sum()) / len(shared))
        shares.append(share)
    return sum(shares) / 2

"""The patterns of svft: which coefficients u_i v_j^T train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import WeightError
from ..records import Spectrum

if TYPE_CHECKING:
    from .svft import SVFT

Places = tuple[torch.Tensor, torch.Tensor]
"""Rows and columns of the trained coefficients."""


CHOSEN = "chosen"
"""The pattern whose places examples choose."""


def line_length(offset: int, P: int, Q: int) -> int:
    """Get how many entries the diagonal j - i = offset of a P x Q matrix has."""
    return max(min(P, Q - offset) if offset >= 0 else min(P + offset, Q), 0)


def _plain(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    diagonal_K = torch.arange(count)
    return diagonal_K, diagonal_K


def _banded(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    P, Q = method.core_shape(*spectrum.shape[:2])
    rows, cols = [], []
    for offset in range(-method.d, method.d + 1):
        line = torch.arange(line_length(offset, P, Q))
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


def _chosen(method: SVFT, spectrum: Spectrum, count: int) -> Places:
    """Take the best of the places that data have ranked (`spectune.prepare`).

    Without a ranking they are all -1, which no forward accepts, until a file brings them.
    """
    ranked = spectrum.places
    flat = torch.full((count,), -1) if ranked is None else ranked[:count].sort().values.cpu()
    return flat // spectrum.shape[2], torch.where(flat < 0, -1, flat % spectrum.shape[2])


PATTERNS: dict[str, Callable[[SVFT, Spectrum, int], Places]] = {
    "plain": _plain,
    "banded": _banded,
    "random": _random,
    "top_k": _top_k,
    CHOSEN: _chosen,
}

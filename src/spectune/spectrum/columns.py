"""Which singular directions are kept: a word, a start index or a list -> explicit places.

Place 0 is the strongest direction; the places of one weight are 0 ... K-1, K = min(O, I).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError, WeightError, nearest

AnyColumns = str | int | Sequence[int]

COLUMN_WORDS = ("top", "bottom", "random")


@dataclass(frozen=True)
class Choice:
    """The places to keep, in the order given, and how far down the spectrum they reach."""

    places: tuple[int, ...]
    K: int
    """The number of directions of the weight."""

    @property
    def leading(self) -> int:
        """How many of the strongest directions a solver must compute to cover all places."""
        return max(self.places) + 1


def choose(columns: AnyColumns, rank: int | None, K: int, seed: int = 0) -> Choice:
    """Get the explicit places that `columns` names, `rank` of them (all K for None).

    "top": 0 ... rank-1. "bottom": K-rank ... K-1. "random": drawn from all K without replacement,
    sorted; numpy's RandomState, whose stream is frozen, so a seed names the same places everywhere.
    An integer n: n ... n+rank-1. A list: these places in this order; rank is None or its length.
    Raises `WeightError` if the weight has too few directions, `OptionError` for an unknown word.
    """
    if isinstance(columns, str):
        return Choice(_word(columns, _checked_rank(rank, K), K, seed), K)
    if isinstance(columns, bool):
        raise OptionError(f"columns={columns}: expected a word, a start index or a list of places.")
    if isinstance(columns, (int, np.integer)):
        return Choice(_from_start(int(columns), rank, K), K)
    return Choice(_listed(columns, rank, K), K)


def _checked_rank(rank: int | None, K: int) -> int:
    if rank is None:
        return K
    if rank < 1:
        raise WeightError(f"r={rank} must be at least 1. Raise r or exclude the layer.")
    if rank > K:
        raise WeightError(
            f"r={rank} is more than this {{shape}} weight has ({K}). Lower r to {K} or exclude the layer."
        )
    return rank


def _word(word: str, rank: int, K: int, seed: int) -> tuple[int, ...]:
    if word == "top":
        return tuple(range(rank))
    if word == "bottom":
        return tuple(range(K - rank, K))
    if word == "random":
        return tuple(sorted(np.random.RandomState(seed).permutation(K)[:rank].tolist()))
    raise OptionError(f"unknown columns={word!r}. {nearest(word, COLUMN_WORDS)}")


def _from_start(start: int, rank: int | None, K: int) -> tuple[int, ...]:
    if not 0 <= start < K:
        raise WeightError(
            f"columns={start}: this {{shape}} weight has columns 0 to {K - 1}. Choose a start in this range or exclude "
            "the layer."
        )
    count = K - start if rank is None else _checked_rank(rank, K)
    if start + count > K:
        raise WeightError(
            f"r={count} from column {start} on is more than this {{shape}} weight has there ({K - start}). Lower r to "
            f"{K - start}, start at {K - count} or earlier, or exclude the layer."
        )
    return tuple(range(start, start + count))


def _listed(columns: Sequence[int], rank: int | None, K: int) -> tuple[int, ...]:
    if not all(isinstance(place, (int, np.integer)) and not isinstance(place, bool) for place in columns):
        raise OptionError(f"columns={columns!r}: a list of columns may contain only integers.")
    places = tuple(int(place) for place in columns)
    if not places:
        raise WeightError("columns: the list is empty. Name at least one column.")
    outside = [place for place in places if not 0 <= place < K]
    if outside:
        raise WeightError(
            f"columns: this {{shape}} weight has columns 0 to {K - 1}, but the list names column {outside[0]}. Take it "
            "off the list or exclude the layer."
        )
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise WeightError(f"columns={list(places)} names column {twice[0]} more than once. Name each column once.")
    if rank is not None and rank != len(places):
        raise WeightError(f"r={rank}, but the list names {len(places)} columns. Set r to {len(places)}.")
    return places

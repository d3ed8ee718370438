"""Which singular columns each of several adapters tunes, so that they can be fused later."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import OptionError


@dataclass(frozen=True)
class Schedule:
    """The columns of every adapter, and the chance that none are shared."""

    r: int
    columns: tuple[tuple[int, ...], ...]
    """One tuple of places in the descending spectrum for each adapter."""
    top: int
    """The columns come from the strongest `top` ones; every adapted weight needs at least this many directions."""
    seeds: tuple[int, ...] = ()
    """One seed per adapter, if the columns were drawn."""
    clear_pair: float = 1.0
    """The chance that two adapters share no column."""
    clear_all: float = 1.0
    """The chance that no two of all the adapters share a column."""

    @property
    def clashes(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """(adapter, adapter, shared columns) for every pair that shares some."""
        found = []
        for (i, first), (j, second) in combinations(enumerate(self.columns), 2):
            if shared := tuple(sorted(set(first) & set(second))):
                found.append((i, j, shared))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers."""
        return {**asdict(self), "clashes": [list(clash) for clash in self.clashes]}


def disjoint_schedule(concepts: int, r: int, start: int = 0) -> Schedule:
    """Get neighbouring blocks for adapters that are planned together: adapter t has [start + t r, start + (t + 1) r).

    The collaborative scheme of the Spectral Adapter (arXiv 2405.13952): strongest columns first, none shared.
    """
    _at_least(1, concepts=concepts, r=r)
    _at_least(0, start=start)
    columns = tuple(tuple(range(start + t * r, start + (t + 1) * r)) for t in range(concepts))
    return Schedule(r, columns, start + concepts * r)


def sampled_schedule(concepts: int, r: int, top: int, seed: int = 0) -> Schedule:
    """Get r columns for each adapter, drawn from the strongest `top` independently of the others.

    The private scheme: adapter t draws with seed + t alone, so only `top` has to be agreed on. A larger `top` clashes
    less but reaches weaker directions. numpy's RandomState, whose stream is frozen: a seed draws the same everywhere.
    """
    _at_least(1, concepts=concepts, r=r)
    _at_least(0, seed=seed)
    if top < r:
        raise OptionError(f"top={top}: cannot draw {r} columns from {top}. Raise top or lower r.")
    seeds = tuple(range(seed, seed + concepts))
    columns = tuple(tuple(sorted(np.random.RandomState(own).permutation(top)[:r].tolist())) for own in seeds)
    return Schedule(r, columns, top, seeds, chance_of_no_clash(top, r), chance_of_no_clash(top, r, concepts))


def chance_of_no_clash(top: int, r: int, concepts: int = 2) -> float:
    """Get the probability that no two of the adapters share a column when each draws r of `top` evenly.

    prod_{i < concepts} C(top - i r, r) / C(top, r): adapter i must miss the i r columns that the others have. For two,
    C(top - r, r) / C(top, r): 0.32 for r = 8 of 64, 0.92 for r = 8 of 768.
    """
    all_ways = math.comb(top, r)
    ways = (math.comb(max(top - taken * r, 0), r) for taken in range(1, concepts))
    return math.prod(way / all_ways for way in ways)


def _at_least(least: int, **values: int) -> None:
    for option, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{option}={value!r} must be an integer of at least {least}.")

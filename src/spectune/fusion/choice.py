"""`choose_rule`: which rule `auto` takes for these adapters, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from .compact import inner
from .contract import Part

AUTO = "auto"
# Updates with a larger mean cosine are versions of one another (checkpoints of one run), which should not be added up.
# Chosen.
ALIKE = 0.5


def choose_rule(layers: Mapping[str, Sequence[Part]], by_data: str | None) -> tuple[str, str]:
    """Get the name of the rule, and the reason; `by_data` is the rule for the examples that are given, if any are."""
    count = len({part.adapter for parts in layers.values() for part in parts})
    if by_data is not None:
        return by_data, f"there are examples of each adapter ({count})"
    if count == 1:
        return "average", "there is one adapter, which is kept as it is"
    cosine = mean_cosine(layers)
    if cosine > ALIKE:
        return "average", f"the {count} updates are much alike (mean cosine {cosine:.2f}), so their mean is taken"
    return (
        "task_singular",
        f"there are no examples, and the {count} updates are different (mean cosine {cosine:.2f}); with --examples it "
        f"would be match",
    )


def mean_cosine(layers: Mapping[str, Sequence[Part]]) -> float:
    """Get the mean cosine of two updates, weighted by their sizes; 0 where no two meet in a layer."""
    shared = sizes = 0.0
    for parts in layers.values():
        for one, other in combinations([part.compact for part in parts], 2):
            shared, sizes = shared + inner(one, other), sizes + one.size * other.size
    return shared / sizes if sizes else 0.0

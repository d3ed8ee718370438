from __future__ import annotations

import pytest

from spectune.errors import OptionError, WeightError
from spectune.spectrum.columns import choose


@pytest.mark.parametrize(
    ("columns", "rank", "places"),
    [
        ("top", 3, (0, 1, 2)),
        ("top", None, tuple(range(10))),
        ("bottom", 3, (7, 8, 9)),
        (4, 3, (4, 5, 6)),
        (7, None, (7, 8, 9)),
        ([5, 1, 8], None, (5, 1, 8)),
        ((5, 1), 2, (5, 1)),
    ],
)
def test_a_choice_becomes_explicit_places(columns, rank, places):
    choice = choose(columns, rank, 10)
    assert choice.places == places
    assert choice.leading == max(places) + 1


def test_random_places_are_distinct_sorted_and_named_by_the_seed():
    places = choose("random", 20, 100, seed=3).places
    assert places == tuple(sorted(set(places))) and len(places) == 20
    assert places == choose("random", 20, 100, seed=3).places
    assert places != choose("random", 20, 100, seed=4).places
    assert max(places) > 50  # drawn from all K, not from the top


def test_random_places_are_the_same_for_ever():
    # Golden: numpy's RandomState(0).permutation(12)[:4], whose stream numpy froze.
    assert choose("random", 4, 12, seed=0).places == (4, 6, 10, 11)


@pytest.mark.parametrize(
    ("columns", "rank", "message"),
    [
        ("top", 0, "r=0 must be at least 1. Raise r"),
        ("top", 11, "r=11 is more than this {shape} weight has (10). Lower r to 10 or exclude the layer."),
        (10, 1, "columns=10: this {shape} weight has columns 0 to 9"),
        (-1, 1, "columns=-1: this {shape} weight"),
        (8, 3, "r=3 from column 8 on is more than this {shape} weight has there (2). Lower r to 2"),
        ([0, 10], None, "this {shape} weight has columns 0 to 9, but the list names column 10"),
        ([-1], None, "the list names column -1"),
        ([3, 3], None, "columns=[3, 3] names column 3 more than once. Name each column once."),
        ([1, 2], 3, "r=3, but the list names 2 columns. Set r to 2."),
        ([], None, "columns: the list is empty"),
    ],
)
def test_a_choice_that_the_weight_cannot_meet_is_refused(columns, rank, message):
    with pytest.raises(WeightError) as error:
        choose(columns, rank, 10)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [("botom", "Did you mean 'bottom'"), (True, "columns=True"), ([1.5], "may contain only integers")],
)
def test_a_choice_that_does_not_exist_is_refused(columns, message):
    with pytest.raises(OptionError) as error:
        choose(columns, None, 10)
    assert message in str(error.value)

"""Who tunes which columns, and the chance that draws clash."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest

from spectune.errors import OptionError
from spectune.fusion import chance_of_no_clash, disjoint_schedule, sampled_schedule


def test_blocks_follow_one_another_and_share_nothing() -> None:
    plan = disjoint_schedule(3, 8)
    assert [columns[0] for columns in plan.columns] == [0, 8, 16] and plan.top == 24
    assert sorted(column for columns in plan.columns for column in columns) == list(range(24))
    assert plan.clashes == () and plan.clear_all == 1.0
    assert disjoint_schedule(2, 2, start=5).columns == ((5, 6), (7, 8))


def test_the_chance_of_no_clash_is_the_papers() -> None:
    assert chance_of_no_clash(64, 8) == pytest.approx(comb(56, 8) / comb(64, 8))
    assert chance_of_no_clash(64, 8) == pytest.approx(0.32, abs=0.005)
    assert chance_of_no_clash(768, 8) == pytest.approx(0.92, abs=0.005)


@pytest.mark.parametrize(("top", "r", "concepts"), [(6, 2, 3), (5, 2, 3), (5, 1, 3)])
def test_the_chance_for_many_counts_all_draws(top: int, r: int, concepts: int) -> None:
    draws = [set(draw) for draw in combinations(range(top), r)]

    def clear_ways(taken: set[int], left: int) -> int:
        return 1 if left == 0 else sum(clear_ways(taken | draw, left - 1) for draw in draws if not taken & draw)

    exact = clear_ways(set(), concepts) / len(draws) ** concepts
    assert chance_of_no_clash(top, r, concepts) == pytest.approx(exact, abs=1e-12)
    assert exact < 1


def test_a_private_draw_depends_on_its_own_seed_alone() -> None:
    plan = sampled_schedule(3, 4, top=32, seed=7)
    assert plan.columns[1] == sampled_schedule(1, 4, top=32, seed=8).columns[0]
    assert plan.columns[0] != plan.columns[1] and plan.seeds == (7, 8, 9)
    assert all(len(set(columns)) == 4 and min(columns) >= 0 and max(columns) < 32 for columns in plan.columns)
    assert plan.clear_pair == chance_of_no_clash(32, 4) and plan.clear_all == chance_of_no_clash(32, 4, 3)


def test_clashes_are_named() -> None:
    plan = sampled_schedule(2, 3, top=4)
    ((first, second, shared),) = plan.clashes
    assert (first, second) == (0, 1) and set(shared) == set(plan.columns[0]) & set(plan.columns[1])
    assert plan.to_json()["clashes"] == [[0, 1, shared]]


@pytest.mark.parametrize(
    "asked", [{"concepts": 0, "r": 2}, {"concepts": 2, "r": 0}, {"concepts": 2, "r": 2, "start": -1}]
)
def test_nonsense_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="an integer of at least"):
        disjoint_schedule(**asked)


def test_more_columns_than_there_are_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot draw 8 columns from 4"):
        sampled_schedule(2, 8, top=4)

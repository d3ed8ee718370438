from __future__ import annotations

import random

import pytest

from spectune.errors import OptionError
from spectune.pages.comparison_page import render_comparison
from spectune.sweeps import parse_sweep, summarise, to_markdown
from spectune.sweeps.paired import paired

from .sweeps import record
from .test_sweep import GRID, plain_sweep

TASKS = ["a", "b"]


def gain(mine: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]], smaller: bool = False) -> dict:  # type: ignore[type-arg]
    scores = {(task, "m"): mine[task] for task in TASKS} | {(task, "base"): theirs[task] for task in TASKS}
    (found,) = paired(scores, ["base", "m"], TASKS, dict.fromkeys(TASKS, smaller), "base")
    return found


def test_what_a_seed_does_to_both_cancels() -> None:
    hard = {0: 0.0, 1: -20.0, 2: 30.0}
    theirs = {task: {seed: 50 + shift for seed, shift in hard.items()} for task in TASKS}
    mine = {"a": {s: v + 1 for s, v in theirs["a"].items()}, "b": {s: v + 3 for s, v in theirs["b"].items()}}
    found = gain(mine, theirs)
    assert found["by_task"] == {"a": pytest.approx(1), "b": pytest.approx(3)} and found["mean"] == pytest.approx(2)
    assert found["error"] == pytest.approx(0) and found["low"] == found["high"] == pytest.approx(2)
    assert gain(mine, theirs, smaller=True)["mean"] == pytest.approx(-2)


def test_the_error_is_that_of_the_mean_over_tasks() -> None:
    found = gain({"a": {0: 1.0, 1: 3.0}, "b": {0: 0.0, 1: 0.0}}, {task: {0: 0.0, 1: 0.0} for task in TASKS})
    assert found["mean"] == 1 and found["error"] == pytest.approx(0.5)  # sqrt(2 / 2 + 0) / 2
    assert found["low"] < 1 < found["high"]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    stream, held = random.Random(1), 0
    for _ in range(40):
        mine = {task: {seed: stream.gauss(0, 1) for seed in range(20)} for task in TASKS}
        found = gain(mine, {task: dict.fromkeys(range(20), 0.0) for task in TASKS})
        held += found["low"] <= 0 <= found["high"]
    assert 33 <= held <= 40  # 95% of 40 is 38


def test_only_seeds_that_both_have_run_are_compared() -> None:
    found = gain({"a": {0: 1.0, 1: 9.0}, "b": {2: 5.0}}, {"a": {0: 0.0, 2: 0.0}, "b": {2: 3.0}})
    assert found["by_task"] == {"a": 1.0, "b": 2.0} and found["pairs"] == 2
    assert found["mean"] == 1.5 and found["error"] is None


def test_a_task_without_a_pair_leaves_no_mean() -> None:
    found = gain({"a": {0: 1.0}, "b": {0: 1.0}}, {"a": {0: 0.0}, "b": {1: 0.0}})
    assert found["mean"] is None and found["by_task"]["b"] is None


def test_a_sweep_shows_what_its_methods_gain_over_the_baseline_at_their_chosen_rates() -> None:
    sweep = parse_sweep(plain_sweep(methods={"a": GRID, "b": GRID}, seeds=[0, 1], baseline="b"))
    low, high = GRID["learning_rates"][:2]
    runs = [
        record(method, rate, seed, validation=0.9 if rate == high else 0.1, test=test + 0.1 * seed)
        for method, at in (("a", 0.63), ("b", 0.60))
        for rate, test in ((low, 0.0), (high, at))
        for seed in (0, 1)
    ]
    found = summarise(sweep, runs)
    (gain,) = found["gains"]
    assert gain["method"] == "a" and gain["mean"] == pytest.approx(0.03) and gain["pairs"] == 2
    assert "## Gain over b" in to_markdown(found) and "| a | +3.00 ± 0.00 | +3.00 to +3.00 |" in to_markdown(found)
    page = render_comparison(found)
    assert "Gain over b" in page and "+3.00 ± 0.00" in page
    plain = summarise(parse_sweep(plain_sweep(methods={"a": GRID, "b": GRID})), runs)
    assert plain["gains"] == [] and "Gain" not in to_markdown(plain) and "Gain over" not in render_comparison(plain)


def test_a_sweep_that_still_chooses_its_rates_has_no_gains_yet() -> None:
    sweep = parse_sweep(plain_sweep(methods={"a": GRID, "b": GRID}, baseline="b"))
    first = record("a", GRID["learning_rates"][0])
    assert first.result is not None
    del first.result.metrics["test"]  # before the rate is chosen, only validation is measured
    (gain,) = summarise(sweep, [first], planned=4)["gains"]
    assert gain["mean"] is None and gain["pairs"] == 0


def test_a_baseline_is_one_of_the_methods() -> None:
    with pytest.raises(OptionError, match="baseline 'lra' is not one of the methods. Did you mean 'lora'"):
        parse_sweep(plain_sweep(methods={"lora": GRID}, baseline="lra"))

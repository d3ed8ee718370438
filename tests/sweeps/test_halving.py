"""`stop: asha`: which rates stop, what is refused, what the record and the table say, going on after a kill."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import MissingExtraError, OptionError
from spectune.pages.comparison_page import render_comparison
from spectune.sweeps import SweepRecord, halving, parse_sweep, run_sweep, summarise, to_markdown
from spectune.sweeps.halving import Halving
from spectune.sweeps.workers import Workers
from tests.sweeps.sweeps import record, text_sweep

STEPS = 8
LOSSES = {1e-3: 0.8, 1e-2: 0.5, 1e-1: 0.9, 1.0: math.nan}
"""Rate -> validation loss; of equal steps, as a look is."""


def asked_of(folder: Path, **more: Any) -> dict[str, Any]:
    asked = text_sweep(folder, seeds=[0, 1, 2], tuning_seeds=2, stop="asha") | more
    asked["run"]["training"] |= {"steps": STEPS, "validate_every": 2}
    asked["methods"]["spectral_a"]["learning_rates"] = list(LOSSES)
    del asked["methods"]["full"]
    return asked


class Pretended:
    """Runs that are over at once; `at` is called with (rate, seed, step) before each step."""

    def __init__(self, at: Callable[[float, int, int], None] = lambda *place: None) -> None:
        self.at, self.steps, self.checkpoints = at, list[tuple[float, int, int]](), dict[str, int]()
        self.stopping = False

    def prepare(self, folder: Path) -> None:
        """Nothing is needed."""

    def stop(self, *, at_once: bool = False) -> None:
        """Nothing runs."""

    def run(self, job: Path, log: Path, on_step: Callable[..., None]) -> int:
        if self.stopping:
            raise KeyboardInterrupt
        told, folder = json.loads(job.read_text()), Path(json.loads(job.read_text())["folder"])
        rate, seed = told["config"]["training"]["learning_rate"], told["config"]["seed"]
        begin, losses = self.checkpoints.get(job.stem, 0), list[tuple[int, float]]()
        for step in range(1, STEPS + 1):
            if step > begin:
                self.at(rate, seed, step)
                self.steps.append((rate, seed, step))
                self.checkpoints[job.stem] = step
                on_step(step, STEPS, 0.5)
            if step % 2 == 0:
                loss = LOSSES[rate] / step if step < STEPS else 1 - LOSSES[rate]  # at the end nothing is left to stop
                losses.append((step, loss))
                on_step(step, STEPS, None, loss)
        metrics = {"validation": {"accuracy": 1 - LOSSES[rate]}} | (
            {} if told["measures"] else {"test": {"accuracy": 0.5}}
        )
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        values = {"metrics": metrics, "validation_losses": losses, "losses": [0.5] * STEPS, "config": told["config"]}
        record(rate=rate, seed=seed).found.model_copy(update=values).write(folder / "result.json")
        Path(told["answer"]).write_text(json.dumps({"seconds": 1.0}))
        return 0


def outcome(records: list[SweepRecord]) -> list[Any]:
    """What a sweep found, without its times."""
    return [(r.rate, r.seed, r.stopped and r.stopped.to_json(), r.metrics) for r in records]


def test_a_hopeless_rate_stops_and_the_figures_are_of_whole_runs(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep, engine = parse_sweep(asked_of(tmp_path)), Pretended()
    found = run_sweep(sweep, tmp_path / "out", provenance={"machine": "?"}, engine=engine, jobs=1)
    # The first is alone at every look; the second is better; the others are worse, and no other seed tries them.
    assert [(r.rate, r.seed, r.ok, r.stopped and r.stopped.step) for r in found] == [
        (1e-3, 0, True, None), (1e-2, 0, True, None), (1e-1, 0, False, 2), (1.0, 0, False, 2),
        (1e-3, 1, True, None), (1e-2, 1, True, None), (1e-2, 2, True, None),
    ]  # fmt: skip
    assert [r.seed for r in found if "test" in r.metrics] == [0, 1, 2]
    assert {r.rate for r in found if "test" in r.metrics} == {1e-2}
    stopped = next(r for r in found if r.stopped)
    assert not stopped.error and stopped.stopped is not None and stopped.stopped.validation_losses == [(2, 0.45)]
    assert stopped.seconds == 0  # an engine's
    assert stopped.stopped.reason == "validation loss 0.45 at step 2 of 8; the best of 3 rates had 0.25"
    assert max(step for rate, _, step in engine.steps if rate >= 1e-1) == 2
    summary = summarise(sweep, found)
    (row,) = summary["rows"]
    assert row["rate"] == 1e-2 and row["seeds"] == 3 and row["failed"] == 0 and not summary["failed"]
    assert [rate for rate, _ in row["validation_by_rate"]] == [1e-3, 1e-2]
    for words in (to_markdown(summary), render_comparison(summary)):
        assert "Stopped early" in words and "task--spectral_a--0.1--0" in words and "Failed" not in words
        assert "2 runs were stopped early by their validation losses (stop: asha), after 4 of 16 steps" in words
    again = Pretended()
    assert outcome(run_sweep(sweep, tmp_path / "out", provenance={}, engine=again, jobs=1)) == outcome(found)
    assert not again.steps


def test_a_stopped_run_here_has_the_seconds_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    pretended = Pretended()

    def slowly(self: Workers, job: Path, log: Path, on_step: Any) -> int:
        time.sleep(0.05)
        return pretended.run(job, log, on_step)

    monkeypatch.setattr(Workers, "run", slowly)
    found = run_sweep(parse_sweep(asked_of(tmp_path)), tmp_path / "out", provenance={}, jobs=1)
    seconds = [r.seconds for r in found if r.stopped]
    assert seconds and min(seconds) >= 0.05


@pytest.mark.parametrize(("loss", "goes_on"), [(0.58, True), (0.62, False), (math.inf, False), (math.nan, False)])
def test_a_rate_that_is_near_the_best_is_not_hopeless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, goes_on: bool
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setitem(LOSSES, 1e-1, loss)
    sweep = parse_sweep(asked_of(tmp_path, seeds=[0], tuning_seeds=1))
    found = run_sweep(sweep, tmp_path / "out", provenance={}, engine=Pretended(), jobs=1)
    assert [r.rate for r in found if r.ok] == [1e-3, 1e-2] + [1e-1] * goes_on


@pytest.mark.parametrize("place", [(1e-2, 0, 5), (1e-1, 0, 1), (1e-1, 0, 2), (1e-2, 1, 3)])
def test_a_killed_sweep_stops_the_same_rates(tmp_path: Path, place: tuple[float, int, int]) -> None:
    """Also one that was killed between two looks of a run, which it goes on with."""
    pytest.importorskip("optuna")
    sweep = parse_sweep(asked_of(tmp_path))
    whole = run_sweep(sweep, tmp_path / "whole", provenance={}, engine=Pretended(), jobs=1)

    def kill(*now: Any) -> None:
        if now == place:
            killed.stopping = True  # as every other process of a sweep that is killed
            raise KeyboardInterrupt

    killed, rest = Pretended(kill), Pretended()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "out", provenance={}, engine=killed, jobs=1)
    rest.checkpoints = killed.checkpoints
    assert outcome(run_sweep(sweep, tmp_path / "out", provenance={}, engine=rest, jobs=1)) == outcome(whole)


def test_where_every_better_rate_fails_the_stopped_ones_go_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")

    def fail(rate: float, seed: int, step: int) -> None:
        if rate <= 1e-2 and step == 3:
            raise RuntimeError("no room")

    class Failing(Pretended):
        def run(self, job: Path, log: Path, on_step: Callable[..., None]) -> int:
            try:
                return super().run(job, log, on_step)
            except RuntimeError as error:
                log.write_text(str(error))
                return 1

    sweep = parse_sweep(asked_of(tmp_path))
    found = run_sweep(sweep, tmp_path / "out", provenance={}, engine=Failing(fail), jobs=1)
    assert not any(r.stopped for r in found) and {(r.rate, r.seed) for r in found if "test" in r.metrics} == {
        (1e-1, 0), (1e-1, 1), (1e-1, 2)
    }  # fmt: skip
    assert sum(bool(r.error) for r in found) == 4


def test_without_the_option_a_stopped_run_is_trained_whole(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    asked, engine = asked_of(tmp_path), Pretended()
    run_sweep(parse_sweep(asked), tmp_path / "out", provenance={}, engine=engine, jobs=1)
    del asked["stop"]
    found = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={}, engine=engine, jobs=1)
    assert all(r.ok and not r.stopped for r in found) and len(found) == 9


@pytest.mark.slow
def test_a_process_is_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, as users have it."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(halving, "MARGIN", 0.0)  # the losses of a tiny model are all near
    asked = asked_of(tmp_path, seeds=[0], tuning_seeds=1)
    asked["methods"]["spectral_a"]["learning_rates"] = [1e-3, 1e4]
    asked["run"]["training"] |= {"steps": 40, "validate_every": 10}
    good, bad = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    assert good.ok and good.found.steps == 40 and [step for step, _ in good.found.validation_losses] == [10, 20, 30, 40]
    assert not bad.ok and not bad.error and bad.stopped is not None and bad.stopped.step == 10
    assert not list((tmp_path / "out/runs").glob("*.*g")) and not list((tmp_path / "out").rglob("checkpoint-*"))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            {"run": {"validate_every": None}},
            "task, spectral_a: stop: asha compares validation losses during training, and",
        ),
        (
            {"run": {"validate_every": 8}},
            "training.validate_every=8 measures nothing before the end of 8 steps. Set 2.",
        ),
        ({"learning_rates": [1e-3]}, "every method has one rate. Leave it out."),
    ],
)
def test_what_could_stop_nothing_is_refused_before_the_first_run(
    tmp_path: Path, wrong: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(tmp_path)
    asked["run"]["training"] |= wrong.pop("run", {})
    asked["methods"]["spectral_a"] |= wrong
    with pytest.raises(OptionError) as found:
        run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    assert line in str(found.value) and not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="stop="):
        parse_sweep(asked | {"stop": "hyperband"})


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"stop: asha: .*pip install 'spectune\[optuna\]'"):
        Halving(parse_sweep(asked_of(tmp_path)))

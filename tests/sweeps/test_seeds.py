"""The figures of a run's method over the seeds of its sweep, as they stand in its card."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev

import pytest

from spectune.runs import RunResult
from spectune.sweeps import SweepRecord, seeds_like


def written(sweep: Path, method: str, rate: float, seed: int, accuracy: float, forgot: float | None = 0.1) -> Path:
    config = {"seed": seed, "adapter": {"method": method}, "training": {"learning_rate": rate}}
    metrics = {"test": {"accuracy": accuracy}}
    result = RunResult(config=config, metrics=metrics, losses=[1.0], learning_rate=rate, trainable=1)
    name = f"{method}-{rate}-{seed}"
    (sweep / "runs" / name).mkdir(parents=True)
    result.write(sweep / "runs" / name / "result.json")
    loss = None if forgot is None else 2.0 + forgot * (seed + 1)
    record = SweepRecord(
        task="t", method=method, kind=method, rate=rate, seed=seed, config=config, result=result,
        general_loss=loss, general_loss_base=None if loss is None else 2.0,
    )  # fmt: skip
    (sweep / "records").mkdir(exist_ok=True)
    record.write(sweep / "records" / f"{name}.json")
    return sweep / "runs" / name


def test_only_seeds_of_the_same_method_and_rate_count(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    run, *_ = [written(tmp_path, "spectral_a", 0.1, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    written(tmp_path, "spectral_a", 0.2, 0, 0.9)
    alone = written(tmp_path, "svft", 0.1, 0, 0.9)
    found = seeds_like(run)
    assert found is not None and found["seeds"] == [0, 1, 2] and found["rate"] == 0.1
    ((split, name, mean, deviation, runs),) = found["metrics"]
    assert (split, name, runs) == ("test", "accuracy", 3)
    assert (mean, deviation) == pytest.approx((0.6, stdev([0.5, 0.6, 0.7])))
    assert found["forgetting"] == pytest.approx((0.2, stdev([0.1, 0.2, 0.3])))
    assert seeds_like(alone) is None and seeds_like(tmp_path) is None


def test_a_run_that_is_in_no_sweep_has_no_spread(tmp_path: Path) -> None:
    run, *_ = [written(tmp_path, "spectral_a", 0.1, seed, 0.5, forgot=None) for seed in range(2)]
    assert seeds_like(run) is None
    (tmp_path / "sweep.json").write_text("{}")
    found = seeds_like(run)
    assert found is not None and "forgetting" not in found

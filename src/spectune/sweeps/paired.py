"""`paired`: what a method gains over a baseline, seed by seed, so that what a seed makes hard or easy cancels."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..recipes.metrics import better_is_smaller
from .config import SweepConfig, metric_of
from .record import SweepRecord

# Resamples of the bootstrap (Efron 1979): the ends of a 95% interval move by about a twentieth of its width.
RESAMPLES = 2000
INTERVAL = 0.95

Scores = Mapping[tuple[str, str], Mapping[int, float]]
"""(task, method) -> seed -> the reported figure at the chosen rate."""


def gains(
    sweep: SweepConfig, records: Sequence[SweepRecord], rows: Sequence[Mapping[str, Any]], splits: Sequence[str]
) -> list[dict[str, Any]]:
    """Get `paired` of a sweep's runs at their chosen rates; nothing where no baseline is named."""
    if sweep.baseline is None:
        return []
    scores: dict[tuple[str, str], dict[int, float]] = {}
    smaller: dict[str, bool] = dict.fromkeys(sweep.tasks, False)
    for row in rows:
        task, method = row["task"], row["method"]
        at = [r for r in records if r.ok and (r.task, r.method, r.rate) == (task, method, row["rate"])]
        # While a sweep still chooses its rates, the runs so far are measured on validation only.
        for record in (record for record in at if any(record.metrics.get(split) for split in splits)):
            name, value = metric_of(record.metrics, splits, sweep.report or sweep.metric)
            smaller[task] = better_is_smaller(name)
            if math.isfinite(value):
                scores.setdefault((task, method), {})[record.seed] = value
    return paired(scores, list(sweep.methods), list(sweep.tasks), smaller, sweep.baseline)


def gain_words(gain: Mapping[str, Any], scale: float) -> tuple[str, str]:
    """Get a gain as people write it: the mean with its standard error, and the 95% interval."""
    if gain["mean"] is None:
        return "–", "–"
    mean = f"{scale * gain['mean']:+.2f}"
    if gain["error"] is None:
        return mean, "one seed"
    low, high = (f"{scale * gain[end]:+.2f}" for end in ("low", "high"))
    return f"{mean} ± {scale * gain['error']:.2f}", f"{low} to {high}"


def paired(
    scores: Scores, methods: Sequence[str], tasks: Sequence[str], smaller_is_better: Mapping[str, bool], baseline: str
) -> list[dict[str, Any]]:
    """Get each method's mean difference to the baseline, above zero where the method is better.

    The mean over tasks of the mean over seeds that both have run; `error` is its standard error, over seeds, and `low`
    to `high` the 95% bootstrap interval, with seeds drawn anew within each task. None where a task has no pair, or for
    the errors with fewer than two seeds. Three seeds make narrow intervals: the standard error is the safer of the two.
    """
    return [
        {"method": method} | _gain(_differences(scores, method, tasks, smaller_is_better, baseline))
        for method in methods
        if method != baseline
    ]


def _differences(
    scores: Scores, method: str, tasks: Sequence[str], smaller_is_better: Mapping[str, bool], baseline: str
) -> dict[str, list[float]]:
    found = {}
    for task in tasks:
        mine, theirs = scores.get((task, method), {}), scores.get((task, baseline), {})
        sign = -1.0 if smaller_is_better[task] else 1.0
        found[task] = [sign * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return found


def _gain(differences: Mapping[str, list[float]]) -> dict[str, Any]:
    by_task = {task: statistics.fmean(values) if values else None for task, values in differences.items()}
    found: dict[str, Any] = {"by_task": by_task, "mean": None, "error": None, "low": None, "high": None}
    found["pairs"] = sum(map(len, differences.values()))
    parts = list(differences.values())
    if not parts or not all(parts) or not all(math.isfinite(value) for part in parts for value in part):
        return found
    found["mean"] = statistics.fmean(map(statistics.fmean, parts))
    if min(map(len, parts)) < 2:
        return found
    found["error"] = math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) / len(parts)
    return found | dict(zip(("low", "high"), _interval(parts), strict=True))


def _interval(parts: Sequence[list[float]]) -> tuple[float, float]:
    stream = random.Random(0)
    means = sorted(
        statistics.fmean(sum(stream.choices(part, k=len(part))) / len(part) for part in parts) for _ in range(RESAMPLES)
    )
    cut = round((1 - INTERVAL) / 2 * RESAMPLES)
    return means[cut], means[-cut - 1]

"""The learning rate of a method: the best mean on validation, never on test."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ..recipes.metrics import better_is_smaller
from .config import metric_of
from .record import SweepRecord


def validation_means(records: Sequence[SweepRecord], metric: str | None) -> dict[float, float]:
    """Get rate -> mean validation figure of one method on one task.

    Only rates that were tried with the most seeds count, so that one lucky run of a rate that crashed elsewhere does
    not win. A figure that is not finite counts as the worst.
    """
    tried: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if record.ok and record.metrics.get("validation"):
            name, value = metric_of(record.metrics, ("validation",), metric)
            worst = math.inf if better_is_smaller(name) else -math.inf
            tried[record.rate].append(value if math.isfinite(value) else worst)
    most = max((len(values) for values in tried.values()), default=0)
    return {rate: sum(values) / most for rate, values in sorted(tried.items()) if len(values) == most}


def chosen_rate(records: Sequence[SweepRecord], metric: str | None) -> float | None:
    """Get the rate with the best mean on validation, of equals the lowest; None where every run failed.

    A single rate needs no validation examples: there is nothing to choose.
    """
    tried = {record.rate for record in records}
    if len(tried) == 1 and any(record.ok for record in records):
        return tried.pop()
    means = validation_means(records, metric)
    if not means:
        return None
    name = next(metric_of(r.metrics, ("validation",), metric)[0] for r in records if r.ok)
    sign = 1 if better_is_smaller(name) else -1
    return min(means, key=lambda rate: (sign * means[rate], rate))


def rate_beyond(rates: Sequence[float], best: float | None) -> float | None:
    """Get the next rate beyond a grid whose best rate is at its end; None if it is inside.

    The step is the grid's own last one: 1e-3, 3e-3 and 9e-3 continue with 2.7e-2 or 3.3e-4.
    """
    grid = sorted(set(rates))
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    end, inner = (grid[0], grid[1]) if best == grid[0] else (grid[-1], grid[-2])
    return float(f"{end * end / inner:.2g}")

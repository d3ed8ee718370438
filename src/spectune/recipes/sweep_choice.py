"""Which learning rate a method gets: the best mean on validation, never looked up on test."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from .sweep import better_is_smaller, metric_of
from .sweep_record import SweepRecord


def validation_means(records: Sequence[SweepRecord], metric: str | None) -> dict[float, float]:
    """Get rate -> mean validation figure of one method on one task.

    Only rates count that were tried with the most seeds, so that one lucky run of a rate that crashed elsewhere does
    not win. What is not finite is as bad as can be.
    """
    tried: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if record.ok:
            name, value = metric_of(record.metrics, ("validation",), metric)
            worst = math.inf if better_is_smaller(name) else -math.inf
            tried[record.rate].append(value if math.isfinite(value) else worst)
    most = max((len(values) for values in tried.values()), default=0)
    return {rate: sum(values) / most for rate, values in sorted(tried.items()) if len(values) == most}


def chosen_rate(records: Sequence[SweepRecord], metric: str | None) -> float | None:
    """Get the rate with the best mean on validation, of equals the lowest; None where every run failed."""
    means = validation_means(records, metric)
    if not means:
        return None
    name = next(metric_of(r.metrics, ("validation",), metric)[0] for r in records if r.ok)
    sign = 1 if better_is_smaller(name) else -1
    return min(means, key=lambda rate: (sign * means[rate], rate))

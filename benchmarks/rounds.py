"""Ratios of runs that take turns: what every benchmark with rounds reports."""

from __future__ import annotations

import statistics


def spread(times: list[float], base: list[float]) -> list[float]:
    """Get lower quartile, median and upper quartile of the ratios round by round."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    quarter = len(ratios) // 4
    return [round(value, 4) for value in (ratios[quarter], statistics.median(ratios), ratios[-1 - quarter])]

"""`write_rate_page`: the curve of a learning rate range test as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import write_atomically
from .frame import fill
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Scale, axes, drawing, line, linear_ticks, log_ticks, text

HEIGHT = 300


def write_rate_page(
    path: str | Path,
    title: str,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    proposed: float | None,
) -> None:
    """Write the curve as a page, all or nothing: raw loss thin, smoothed loss strong, proposal dashed.

    `MissingExtraError` without jinja2, `OutputError` where the file cannot be written.
    """
    said = "No rate made the loss fall." if proposed is None else f"Proposed learning rate: {proposed:.2g}"
    chart = rate_chart(rates, losses, smoothed, proposed)
    write_atomically(path, fill("rates.html.j2", title=title, said=said, chart=chart))


def rate_chart(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], proposed: float | None
) -> str:
    """Get the loss over the learning rate (on a log axis) as SVG."""
    finite = [value for value in smoothed if math.isfinite(value)]
    if not finite:
        return drawing("Learning rate range test", 60, [text(WIDTH / 2, 34, "no finite loss", anchor="middle")])
    low, start = min(finite), finite[0]
    # The axis ends a little above the start: a diverged loss would flatten the rest.
    high = max(start, low) + 0.5 * max(start - low, 0.05 * abs(start), 1e-9)
    x = Scale(rates[0], max(rates[-1], rates[0] * 1.001), LEFT, WIDTH - RIGHT, log=True)
    y = Scale(low - 0.1 * (high - low), high, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, log_ticks(x.low, x.high), linear_ticks(y.low, y.high), "learning rate", "loss")]
    for values, kind in ((losses, "raw"), (smoothed, "after")):
        points = (
            (x(r), y(min(max(v, y.low), high))) if math.isfinite(v) else None
            for r, v in zip(rates, values, strict=True)
        )
        parts.append(line(points, kind))
    if proposed is not None:
        at = x(min(max(proposed, x.low), x.high))
        parts.append(line([(at, y.start), (at, y.end)], "change"))
    return drawing("Learning rate range test", HEIGHT, parts)

"""`write_rate_page`: the curve of a learning rate range test as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import write_atomically
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Scale, axes, drawing, line, linear_ticks, log_ticks, text

HEIGHT = 300
STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --ink: #1d1c1a; --muted: #65625b; --rule: #e2dfd8; --raw: #9db6e3;
  --after: #2458b8; --change: #b8501a; }
@media (prefers-color-scheme: dark) { :root { --page: #131312; --ink: #ebe8e2; --muted: #a39f96; --rule: #31302d;
  --raw: #3f5f93; --after: #7fb0ff; --change: #f0955c; } }
body { margin: 2rem auto; max-width: 760px; padding: 0 1rem; background: var(--page); color: var(--ink);
  overflow-wrap: break-word; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; } .chart { display: block; width: 100%; height: auto; }
.chart text { font-size: 12px; fill: var(--muted); } .chart .grid { stroke: var(--rule); }
.chart .axis, .chart .tick { stroke: var(--muted); }
.chart .line { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke: var(--raw); } .chart .after { stroke: var(--after); stroke-width: 2; }
.chart .change { stroke: var(--change); stroke-width: 1.6; stroke-dasharray: 4 4; }
"""


def write_rate_page(
    path: str | Path,
    title: str,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    proposed: float | None,
) -> None:
    """Write the curve as a page, whole or not at all: raw loss thin, smoothed loss strong, proposal dashed."""
    said = "No rate made the loss fall." if proposed is None else f"Proposed learning rate: {proposed:.2g}"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{said}</p>{rate_chart(rates, losses, smoothed, proposed)}</body></html>\n"
    )
    write_atomically(path, page)


def rate_chart(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], proposed: float | None
) -> str:
    """Get the loss over the learning rate (on a log axis) as SVG."""
    finite = [value for value in smoothed if math.isfinite(value)]
    if not finite:
        return drawing("Learning rate range test", 60, [text(WIDTH / 2, 34, "no finite loss", anchor="middle")])
    low, start = min(finite), finite[0]
    # What blew up would flatten the rest: the axis ends a little above the start.
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

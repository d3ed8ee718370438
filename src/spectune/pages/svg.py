"""The parts of charts: scales, ticks, axes, lines, text; SVG without scripts or outside references.

Colours are CSS classes of the page (`ink`, `muted`, `grid`, `before`, `after`, `change`), so that one
drawing serves the light and the dark page. No `xmlns`: inside HTML the parser knows SVG by its name.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 14, 46


@dataclass(frozen=True)
class Scale:
    """A map from numbers to places on the drawing, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1.0)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Get about `count` round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    span = (high - low) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Get powers of ten between low and high, thinned to about `count`; with 2s and 5s where a decade is all."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / count))
    decades = [10.0**k for k in range(first, last + 1, stride)]
    if len(decades) > 2:
        return decades
    between = (m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5))
    return [value for value in between if low * 0.999 <= value <= high * 1.001]


def label(value: float) -> str:
    """Get a tick's text: short, without trailing zeros."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.6g}"


def text(x: float, y: float, words: str, kind: str = "muted", anchor: str = "start", more: str = "") -> str:
    """Get one line of text, escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(words)}</text>'


def line(points: Iterable[tuple[float, float] | None], kind: str) -> str:
    """Get a path through the points; None is a gap."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            # A point between two gaps would be no line at all: an empty stroke with round ends is a dot.
            parts += ["h0"] if pen == "M" else []
            pen = "L"
    return f'<path class="line {kind}" d="{" ".join(parts)}"/>'


def axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, y_name: str) -> str:
    """Get the grid, the ticks with their numbers, and the names of both axes."""
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(x.start - 6, y(tick) + 4, label(tick), anchor="end"))
    for tick in x_ticks:
        parts.append(f'<line class="tick" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.start}" y2="{y.start + 4}"/>')
        parts.append(text(x(tick), y.start + 19, label(tick), anchor="middle"))
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    parts.append(text((x.start + x.end) / 2, y.start + 38, x_name, anchor="middle"))
    middle = (y.start + y.end) / 2
    parts.append(text(13, middle, y_name, anchor="middle", more=f' transform="rotate(-90 13 {middle:.1f})"'))
    return "".join(parts)


def drawing(title: str, height: float, parts: Iterable[str]) -> str:
    """Get the whole SVG element: as wide as its container, with a title for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" class="chart">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )

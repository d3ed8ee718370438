"""The charts of a comparison: test figure over trained numbers with its front, and validation over the rates tried."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Scale, axes, drawing, line, linear_ticks, log_ticks, text

HEIGHT = 330
# Two names closer than a line of text would overprint each other.
LINE = 13
# Smallest room for letters beside a dot.
LETTERS = 20
# Dash patterns distinguish lines for readers who cannot by colours.
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
COLOURS = 6


def front(points: Sequence[tuple[float, float]], smaller_is_better: bool = False) -> list[int]:
    """Get the indices of the Pareto-optimal points: smaller is better on x, and the measure on y.

    In order of x.
    """
    sign = -1 if smaller_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    found: list[int] = []
    for place in order:
        if not found or sign * points[place][1] > sign * points[found[-1]][1]:
            found.append(place)
    return found


def front_chart(rows: Sequence[Mapping[str, Any]], metric: str, smaller_is_better: bool) -> str:
    """Get the test figure over the trained numbers (log axis), its range over the seeds, and the front as a line."""
    shown = [r for r in rows if r["test"] is not None and r["trainable"]]
    title = f"Test {metric} over trained numbers"
    if not shown:
        return drawing(title, 60, [text(WIDTH / 2, 34, "no run was finished", anchor="middle")])
    times = 1 if smaller_is_better else 100
    points = [(float(r["trainable"]), times * r["test"]) for r in shown]
    ends = [times * float(value) for r in shown for value in (r["low"], r["high"]) if value is not None]
    x, y = _scales([p[0] for p in points], [p[1] for p in points] + ends)
    name = metric if smaller_is_better else f"{metric}, %"
    x_ticks = log_ticks(x.low, x.high)
    parts = [axes(x, y, x_ticks, linear_ticks(y.low, y.high), "trained numbers, without the head", f"test {name}")]
    best = front(points, smaller_is_better)
    if len(best) > 1:
        parts.append(line([(x(points[i][0]), y(points[i][1])) for i in best], "front"))
    places = _label_places([(x(a), y(b)) for a, b in points])
    for i, (r, (a, b)) in enumerate(zip(shown, points, strict=True)):
        low, high = (times * float(r[key]) if r[key] is not None else b for key in ("low", "high"))
        parts.append(_mark(r, metric, x(a), (y(low), y(b), y(high)), places[i], i in best, f"{b:.4g}"))
    return drawing(title, HEIGHT, parts)


def _scales(xs: Sequence[float], ys: Sequence[float]) -> tuple[Scale, Scale]:
    air = 0.08 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 1.0
    x = Scale(min(xs) / 1.6, max(xs) * 1.6, LEFT, WIDTH - RIGHT, log=True)
    return x, Scale(min(ys) - air, max(ys) + air, HEIGHT - BOTTOM, TOP)


def _mark(
    row: Mapping[str, Any],
    metric: str,
    at: float,
    heights: tuple[float, float, float],
    label: tuple[float, float, str],
    best: bool,
    said: str,
) -> str:
    low, middle, high = heights
    seeds = "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
    words = f"{row['method']}: {metric} {said}, {row['trainable']:,} numbers, {seeds}"
    return (
        f"<g><title>{html.escape(words)}</title>"
        f'<line class="range" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<circle class="{"best" if best else "dot"}" cx="{at:.1f}" cy="{middle:.1f}" r="4.5"/>'
        + text(label[0], label[1], _short(str(row["method"])), "ink halo", label[2])
        + "</g>"
    )


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def _label_places(dots: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Get the place of each name: beside its dot, on the side with room, moved down if another name is there."""
    found: dict[int, tuple[float, float, str]] = {}
    for i in sorted(range(len(dots)), key=lambda i: dots[i][1]):
        a, b = dots[i]
        right = a < LEFT + 0.62 * (WIDTH - LEFT - RIGHT)
        at, anchor, height = (a + 9, "start", b + 4) if right else (a - 9, "end", b + 4)
        near = sorted(h for other, h, side in found.values() if abs(other - at) < 110 and side == anchor)
        for taken in near:
            height = taken + LINE if abs(height - taken) < LINE else height
        found[i] = (at, height, anchor)
    return [found[i] for i in range(len(dots))]


def rate_chart(rows: Sequence[Mapping[str, Any]], metric: str, smaller_is_better: bool) -> str:
    """Get the mean validation figure over the learning rates that were tried, a line for each method."""
    title = f"Validation {metric} over the learning rate"
    times = 1 if smaller_is_better else 100
    drawn = [(r, [(a, times * b) for a, b in r["validation_by_rate"] if b is not None]) for r in rows]
    values = [point for _, points in drawn for point in points]
    if not values:
        return drawing(title, 60, [text(WIDTH / 2, 34, "no run was finished", anchor="middle")])
    x, y = _scales([p[0] for p in values], [p[1] for p in values])
    name = metric if smaller_is_better else f"{metric}, %"
    y_ticks = linear_ticks(y.low, y.high)
    parts = [axes(x, y, log_ticks(x.low, x.high), y_ticks, "learning rate (log axis)", f"validation {name}")]
    for place, (r, points) in enumerate(drawn):
        kind = f"m{place % COLOURS}"
        dash = f' stroke-dasharray="{DASHES[place // COLOURS % len(DASHES)]}"'
        parts.append(line([(x(a), y(b)) for a, b in points], kind).replace("/>", f"{dash}/>"))
        for a, b in points:
            mark = "chosen" if a == r["rate"] else "tried"
            said = html.escape(f"{r['method']} at {a:g}: {b:.4g}")
            parts.append(
                f'<circle class="{kind} {mark}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{5 if mark == "chosen" else 3}">'
                f"<title>{said}</title></circle>"
            )
    return drawing(title, HEIGHT, parts)

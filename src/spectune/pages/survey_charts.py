"""The charts of a survey: spectra of one kind of layer over each other, budgets and overlaps as bars."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from ..surveys.figures import median
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Scale, axes, drawing, label, line, log_ticks, text

HEIGHT = 250
ROW = 46
# The end of a spectrum would fill most of the axis; values under this share of the largest (a millionth of its
# energy) are not drawn. Chosen.
FLOOR = 1e-3
# Points of one line, as far apart on a log axis as they can be. Chosen, not measured.
MOST_POINTS = 120
# More lines than this are a grey band and a large file; then an even selection is drawn. Chosen.
MOST_LINES = 48
LETTERS = 40


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its length, the text at its end, and a tick to compare it with."""

    name: str
    value: float
    said: str
    tick: float | None = None


def spectra_chart(title: str, spectra: Sequence[Sequence[float]], mark: int | None = None) -> str:
    """Get spectra over each other on log axes, the median of each place as a strong line, a mark at place `mark`."""
    spectra = [values for values in spectra if values and values[0] > 0]
    if not spectra:
        return drawing(title, 60, [text(WIDTH / 2, 34, "all singular values are zero", anchor="middle")])
    count = max(map(len, spectra))
    largest = max(values[0] for values in spectra)
    floor = largest * FLOOR
    least = min(min(value for value in values if value > floor) for values in spectra if values[0] > floor)
    x = Scale(1, max(count, 2), LEFT, WIDTH - RIGHT, log=True)
    y = Scale(least / 1.3, largest * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    x_ticks = [tick for tick in log_ticks(1, max(count, 2)) if tick == int(tick)]
    parts = [axes(x, y, x_ticks, log_ticks(y.low, y.high), "place in the spectrum", "singular value")]
    if mark is not None and 1 < mark < count:
        parts.append(f'<line class="mark-r" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{y.end}" y2="{y.start}"/>')
        parts.append(text(x(mark) + 5, y.start - 8, f"r = {mark}", "muted halo"))
    step = max(1, -(-len(spectra) // MOST_LINES))
    parts += [_spectrum_line(x, y, values, floor, "raw") for values in spectra[::step]]
    if len(spectra) > 1:
        middle = [median([values[i] for values in spectra if len(values) > i]) for i in range(count)]
        parts.append(_spectrum_line(x, y, middle, floor, "after"))
    else:
        parts[-1] = _spectrum_line(x, y, spectra[0], floor, "after")
    return drawing(title, HEIGHT, parts)


def _spectrum_line(x: Scale, y: Scale, values: Sequence[float], floor: float, kind: str) -> str:
    count = len(values)
    places = sorted({max(1, round(count ** (i / (MOST_POINTS - 1)))) for i in range(MOST_POINTS)})
    points = ((x(i), y(values[i - 1])) if values[i - 1] > max(floor, y.low) else None for i in places)
    return line(points, kind)


def log_bars(title: str, bars: Sequence[Bar], unit: str) -> str:
    """Get one bar for each value on a logarithmic axis that begins at a power of ten below the least."""
    shown = [bar.value for bar in bars if bar.value > 0]
    if not shown:
        return drawing(title, 60, [text(WIDTH / 2, 34, "nothing to show", anchor="middle")])
    low = 10.0 ** (len(f"{min(shown):.0f}") - 1) / 10
    x = Scale(low, max(max(shown) * 1.02, low * 100), 4, WIDTH - 8, log=True)
    ticks = [tick for tick in log_ticks(x.low, x.high) if tick >= low]
    return _bars(title, bars, x, [(tick, f"{_short(tick)}{unit}") for tick in ticks])


def share_bars(title: str, bars: Sequence[Bar]) -> str:
    """Get one bar for each share, on an axis from 0 to 100%, with a tick where chance would put it."""
    x = Scale(0, 1, 4, WIDTH - 8)
    return _bars(title, bars, x, [(tick, f"{tick:.0%}") for tick in (0, 0.25, 0.5, 0.75, 1)])


def _bars(title: str, bars: Sequence[Bar], x: Scale, ticks: Sequence[tuple[float, str]]) -> str:
    bottom = len(bars) * ROW + 6
    parts = []
    for tick, words in ticks:
        at = x(tick)
        anchor = "start" if at < 20 else "end" if at > WIDTH - 20 else "middle"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(text(at, bottom + 18, words, anchor=anchor))
    parts += [_bar(x, bar, place * ROW) for place, bar in enumerate(bars)]
    return drawing(title, bottom + 26, parts)


def _bar(x: Scale, bar: Bar, top: float) -> str:
    name = bar.name if len(bar.name) <= LETTERS else bar.name[: LETTERS - 1] + "…"
    length = max(x(bar.value) - x.start, 0.0) if bar.value > 0 else 0.0
    tick = ""
    if bar.tick is not None:
        at = x(bar.tick)
        tick = f'<line class="chance" x1="{at:.1f}" x2="{at:.1f}" y1="{top + 23}" y2="{top + 43}"/>'
    return (
        f"<g><title>{html.escape(bar.name)}: {html.escape(bar.said)}</title>"
        + text(x.start, top + 20, name, "ink halo")
        + text(x.end, top + 20, bar.said, "ink halo heavy", "end")
        + f'<rect class="groove" x="{x.start}" y="{top + 27}" width="{x.end - x.start}" height="12" rx="3"/>'
        + f'<rect class="bar strong" x="{x.start}" y="{top + 27}" width="{length:.1f}" height="12" rx="3"/>{tick}</g>'
    )


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return label(value)

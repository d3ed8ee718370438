"""The charts of a report: the loss, bars of shares, and spectra before and after."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..runs.result import LayerMove, LayerSpectrum, Metric
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Scale, axes, drawing, line, linear_ticks, log_ticks, text

HEIGHT = 270
# More points than a screen has pixels only make the file longer. Chosen, not measured.
MOST_POINTS = 400
# The smoothed loss weighs steps by exp(-distance / (this share of the run)). Chosen, not measured.
SMOOTHING = 0.02
# Changes under this share of the largest singular value are float32's roundoff and not drawn.
SMALLEST = 1e-6
ROW = 46
# A line of the drawing holds this many letters at the size that a phone shows.
LETTERS = 40


def loss_chart(
    loss: Sequence[float], title: str = "Training loss", validation: Sequence[tuple[int, float]] = ()
) -> str:
    """Get the loss per step as a thin line, and the mean around it as a strong one; not-a-number leaves a gap.

    `validation` are (step, loss) of held-out examples, drawn as a dotted line.
    """
    finite = sorted(value for value in loss if math.isfinite(value))
    if not finite:
        return drawing(title, 60, [text(WIDTH / 2, 34, "no finite loss was recorded", anchor="middle")])
    # One early spike must not flatten the rest: the axis ends at the 99th percentile, with air.
    held_out = [value for _, value in validation if math.isfinite(value)]
    top = max(finite[min(len(finite) - 1, int(0.99 * len(finite)))] * 1.08, max(held_out, default=0.0) * 1.08, 1e-12)
    x = Scale(1, max(len(loss), 2), LEFT, WIDTH - RIGHT)
    y = Scale(min(0.0, finite[0]), top, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, _step_ticks(len(loss)), linear_ticks(y.low, y.high), "step", "loss")]
    for values, kind in ((list(loss), "raw"), (smoothed(loss), "after")):
        parts.append(line((_point(x, y, step, values[step - 1]) for step in _thinned(len(loss))), kind))
    if validation:
        parts.append(line((_point(x, y, step, value) for step, value in validation), "change"))
    return drawing(title, HEIGHT, parts)


def step_chart(curves: Mapping[str, Sequence[float]], title: str) -> str:
    """Get up to two figures of every step, each as the mean around the step: the first as a line, the second dotted."""
    finite = [value for values in curves.values() for value in values if math.isfinite(value)]
    if not finite:
        return drawing(title, 60, [text(WIDTH / 2, 34, "no finite figure was recorded", anchor="middle")])
    count = max(len(values) for values in curves.values())
    x = Scale(1, max(count, 2), LEFT, WIDTH - RIGHT)
    y = Scale(min(0.0, *finite), max(0.0, *finite) or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, _step_ticks(count), linear_ticks(y.low, y.high), "step", title.lower())]
    for values, kind in zip(curves.values(), ("after", "change"), strict=False):
        means = smoothed(values)
        parts.append(line((_point(x, y, step, means[step - 1]) for step in _thinned(len(means))), kind))
    return drawing(title, HEIGHT, parts)


def _point(x: Scale, y: Scale, step: int, value: float) -> tuple[float, float] | None:
    return (x(step), y(min(value, y.high))) if math.isfinite(value) else None


def _step_ticks(steps: int) -> list[float]:
    return [tick for tick in linear_ticks(0, steps, 6) if tick >= 1 and tick == int(tick)] or [1]


def smoothed(values: Sequence[float]) -> list[float]:
    """Get the mean around each step, weighed by exp(-distance): it does not lag behind, as a mean of the past would."""
    past, future = _running(values), _running(values[::-1])[::-1]
    return [(p + f) / 2 for p, f in zip(past, future, strict=True)]


def _running(values: Sequence[float]) -> list[float]:
    keep = math.exp(-1 / max(1.0, SMOOTHING * len(values)))
    total, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if math.isfinite(value) else value)
    return means


def _thinned(count: int) -> list[int]:
    """Get at most `MOST_POINTS` of 1…count, evenly, with both ends."""
    if count <= MOST_POINTS:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})


def bar_chart(metrics: Sequence[Metric], title: str = "Accuracy", strong: int | None = None) -> str:
    """Get one horizontal bar per share, on an axis from 0 to 100%; the bar at place `strong` stands out."""
    x = Scale(0, 1, 4, WIDTH - 8)
    bottom = len(metrics) * ROW + 6
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        anchor = "start" if tick == 0 else "end" if tick == 1 else "middle"
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(text(x(tick), bottom + 18, f"{tick:.0%}", anchor=anchor))
    parts += [_bar(x, metric, place * ROW, place == strong) for place, metric in enumerate(metrics)]
    return drawing(title, bottom + 26, parts)


def _bar(x: Scale, metric: Metric, top: float, strong: bool) -> str:
    name = metric.name if len(metric.name) <= LETTERS else metric.name[: LETTERS - 1] + "…"
    kind = "strong" if strong else "plain"
    said = f"{metric.name}: {metric.value:.1%}" + (f" ({metric.note})" if metric.note else "")
    return (
        f"<g><title>{html.escape(said)}</title>"
        + text(x.start, top + 20, name, "ink halo" + (" heavy" if strong else ""))
        + text(x.end, top + 20, f"{metric.value:.1%}", "ink halo heavy", "end")
        + f'<rect class="groove" x="{x.start}" y="{top + 27}" width="{x.end - x.start}" height="12" rx="3"/>'
        + f'<rect class="bar {kind}" x="{x.start}" y="{top + 27}" width="{x(metric.value) - x.start:.1f}" '
        + 'height="12" rx="3"/></g>'
    )


def spectrum_chart(layer: LayerSpectrum) -> str:
    """Get the singular values before and after on log axes, and how far each has moved.

    The change is |after - before| place by place in descending order. Changes under 1e-6 of the largest
    value, roundoff of the SVD, are left out.
    """
    count = min(len(layer.before), len(layer.after))
    before, after = layer.before[:count], layer.after[:count]
    change = [abs(a - b) for a, b in zip(after, before, strict=True)]
    largest = max([v for v in (*before, *after) if math.isfinite(v)], default=0.0)
    if largest <= 0:
        return drawing(layer.name, 60, [text(WIDTH / 2, 34, "the weight is zero", anchor="middle")])
    floor = largest * SMALLEST
    least = min(v for v in (*before, *after, *change) if v > floor)
    x = Scale(1, max(count, 2), LEFT, WIDTH - RIGHT, log=True)
    y = Scale(least / 1.3, largest * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    ticks = log_ticks(y.low, y.high), [t for t in log_ticks(1, max(count, 2)) if t == int(t)]
    parts = [axes(x, y, ticks[1], ticks[0], "place in the spectrum", "singular value")]
    for values, kind in ((before, "before"), (after, "after"), (change, "change")):
        points = ((x(i), y(values[i - 1])) if values[i - 1] > floor else None for i in _spread(count))
        parts.append(line(points, kind))
    return drawing(f"Singular values of {layer.name} before and after tuning", HEIGHT, parts)


def update_chart(updates: Sequence[LayerMove]) -> str:
    """Get |dW| as a share of |W|, a bar for each layer in the model's order; a pointer shows its name."""
    top = max((update.share for update in updates), default=0.0) or 1.0
    x = Scale(0, len(updates), LEFT, WIDTH - RIGHT)
    y = Scale(0, 100 * top * 1.05, HEIGHT - BOTTOM, TOP)
    ticks = [tick for tick in _step_ticks(len(updates)) if tick <= len(updates)]
    parts = [axes(x, y, ticks, linear_ticks(y.low, y.high), "layer", "moved, % of its norm")]
    width = (x.end - x.start) / max(len(updates), 1)
    for place, update in enumerate(updates):
        height = max(y.start - y(100 * update.share), 0.5)
        parts.append(
            f'<rect class="bar strong" x="{x(place) + 0.1 * width:.2f}" y="{y.start - height:.2f}" '
            f'width="{0.8 * width:.2f}" height="{height:.2f}">'
            f"<title>{html.escape(update.name)}: {update.share:.2%}</title></rect>"
        )
    return drawing("How far each layer moved", HEIGHT, parts)


def _spread(count: int) -> list[int]:
    """Get at most `MOST_POINTS` of 1…count, as far apart on a log axis as they can be."""
    if count <= MOST_POINTS:
        return list(range(1, count + 1))
    return sorted({round(count ** (i / (MOST_POINTS - 1))) for i in range(MOST_POINTS)})

"""`write_overlap_page`: how much several adapters overlap, layer by layer, as heat maps on one HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from ..checkpoint import write_atomically
from ..fusion import OverlapReport, PairOverlap
from ..runs import Kept
from .frame import fill
from .svg import WIDTH, drawing, text

ROW, HEAD, NAMES = 18, 34, 190
# A narrower cell shows only its colour (a pointer still shows the figure).
ROOM_FOR_FIGURE = 34
# Letters that fit into the space for layer names, at the size of the small print.
LETTERS = 24

Measure = Callable[[PairOverlap], float]
MEASURES: dict[str, tuple[str, Measure]] = {
    "Same update": (
        "The cosine between two updates, without its sign: 0% is independent, 100% is the same.",
        lambda pair: abs(pair.cosine),
    ),
    "Same inputs": (
        "How much both react to the same inputs: |dW1 dW2ᵀ| as a share of |dW1| |dW2|.",
        lambda pair: pair.input_cross,
    ),
    "Same outputs": (
        "How much both write into the same outputs: |dW1ᵀ dW2| as a share of |dW1| |dW2|.",
        lambda pair: pair.output_cross,
    ),
    "Mixed terms": (
        "Terms from multiplying shared singular columns, which neither adapter learned, as a share of both updates "
        "(spectral rule at weight 1). Zero without shared columns.",
        lambda pair: pair.spectral_cross,
    ),
}


def write_overlap_page(report: OverlapReport, path: str | Path, tasks: Sequence[Kept] = ()) -> None:
    """Write the overlap report as a self-contained HTML page, all or nothing; with what each task keeps, if measured.

    `MissingExtraError` without jinja2, `OutputError` where the file cannot be written.
    """
    write_atomically(path, render_overlap(report, tasks))


def render_overlap(report: OverlapReport, tasks: Sequence[Kept] = ()) -> str:
    """Get the page as text; everything that comes from the report is escaped."""
    maps = []
    if report.pairs:
        for name, (say, measure) in MEASURES.items():
            maps.append((name, say, adapter_map(report, name, measure), layer_map(report, name, measure)))
    return fill(
        "overlap.html.j2",
        report=report,
        maps=maps,
        kept=[(name, weight, report.kept[name]) for name, weight in zip(report.adapters, report.weights, strict=True)],
        kept_map=kept_map(report),
        letters=letters(report),
        shared=sorted({(pair.first, pair.second) for pair in report.pairs if pair.shared_columns}),
        rank=max(layer.rank for layer in report.layers),
        task_heads=task_heads(tasks),
        tasks=task_rows(tasks),
    )


def task_heads(tasks: Sequence[Kept]) -> list[str]:
    """Get the columns of the table of what each task keeps."""
    return ["merge", "kept, mean", *(f"{task.run.name} ({task.split} {task.metric})" for task in tasks)]


def task_rows(tasks: Sequence[Kept]) -> list[list[str]]:
    """Get a row for each merge: the mean share that is kept, then each task's figure and share."""
    if not tasks:
        return []
    rows = [["each one's own", "100.0%", *(f"{task.own:.4f}" for task in tasks)]]
    for merge in tasks[0].after:
        shares = [task.share(merge) for task in tasks]
        cells = [f"{task.after[merge]:.4f} ({share:.1%})" for task, share in zip(tasks, shares, strict=True)]
        rows.append([merge, f"{sum(shares) / len(shares):.1%}", *cells])
    return rows


def letters(report: OverlapReport) -> dict[str, str]:
    """Get a short name for every adapter, for the heads of narrow columns: A to Z, then A1, B1, …"""
    return {name: chr(65 + i % 26) + (str(i // 26) if i >= 26 else "") for i, name in enumerate(report.adapters)}


def adapter_map(report: OverlapReport, title: str, measure: Measure) -> str:
    """Get adapters against adapters: the mean of a measure over the layers that both have."""
    short, names = letters(report), report.adapters
    sums: dict[tuple[str, str], list[float]] = {}
    for pair in report.pairs:
        sums.setdefault((pair.first, pair.second), []).append(measure(pair))
    means = {key: sum(values) / len(values) for key, values in sums.items()}
    rows = [[means.get((row, column), means.get((column, row))) for column in names] for row in names]
    return _map(f"{title}: mean of all layers", [f"{short[n]}  {n}" for n in names], list(short.values()), rows)


def layer_map(report: OverlapReport, title: str, measure: Measure) -> str:
    """Get layers against pairs of adapters."""
    short = letters(report)
    found = {(pair.layer, pair.first, pair.second): measure(pair) for pair in report.pairs}
    pairs = [pair for pair in combinations(report.adapters, 2)]
    layers = list(dict.fromkeys(pair.layer for pair in report.pairs))
    rows = [[found.get((layer, *pair)) for pair in pairs] for layer in layers]
    return _map(f"{title}: every layer", layers, [f"{short[a]}{short[b]}" for a, b in pairs], rows)


def kept_map(report: OverlapReport) -> str:
    """Get layers against adapters: the strength kept."""
    rows = [[layer.kept.get(name) for name in report.adapters] for layer in report.layers]
    return _map("Strength kept", [layer.layer for layer in report.layers], list(letters(report).values()), rows)


def _map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """Get a heat map: one row of cells for each name; None is an empty place."""
    width = min((WIDTH - NAMES) / len(columns), 90)
    parts = [
        text(NAMES + (place + 0.5) * width, HEAD - 10, name, anchor="middle")
        for place, name in enumerate(columns)
        if width >= 6 * len(name) + 4
    ]
    for line, (name, cells) in enumerate(zip(rows, values, strict=True)):
        top = HEAD + line * ROW
        parts.append(
            f"<g><title>{html.escape(name)}</title>{text(NAMES - 8, top + 13, _short(name), anchor='end')}</g>"
        )
        for place, value in enumerate(cells):
            if value is not None:
                said = f"{name}, {columns[place]}: {value:.1%}"
                parts.append(_cell(NAMES + place * width, top, width, value, said))
    return drawing(title, HEAD + len(rows) * ROW + 4, parts)


def _cell(left: float, top: float, width: float, value: float, said: str) -> str:
    depth = min(max(value, 0.0), 1.0)
    figure = ""
    if width >= ROOM_FOR_FIGURE:
        kind = "cell deep" if depth > 0.5 else "cell"
        figure = text(left + width / 2, top + 13, f"{value:.0%}", kind, "middle")
    return (
        f"<g><title>{html.escape(said)}</title>"
        f'<rect class="groove" x="{left + 1:.1f}" y="{top + 1}" width="{width - 2:.1f}" height="{ROW - 2}"/>'
        f'<rect class="heat" x="{left + 1:.1f}" y="{top + 1}" width="{width - 2:.1f}" height="{ROW - 2}" '
        f'fill-opacity="{depth:.3f}"/>{figure}</g>'
    )


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else "…" + name[1 - LETTERS :]

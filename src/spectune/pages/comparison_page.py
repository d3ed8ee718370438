"""`write_comparison`: methods side by side as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .comparison_charts import COLOURS, front_chart, rate_chart
from .frame import fill
from .run_page import readable_bytes


def write_comparison(summary: Mapping[str, Any], path: str | Path, published: Mapping[str, Any] | None = None) -> None:
    """Write a sweep's summary as a self-contained page, whole or not at all.

    `published` puts a paper's figures beside the measured ones: `source`, `rows` (method -> task -> figure as
    printed), `deviations`, `computed` (tables of name, head and rows). Everything is escaped. `MissingExtraError`
    without jinja2, `OutputError` where the file cannot be written.
    """
    write_atomically(path, render_comparison(summary, published))


def render_comparison(summary: Mapping[str, Any], published: Mapping[str, Any] | None = None) -> str:
    """Get the page as text."""
    parts = []
    for task in summary["tasks"]:
        smaller, small_chosen = summary["smaller_is_better"][task], summary["smaller_is_chosen"][task]
        metric, chosen_by = summary["task_metrics"][task], summary["task_chosen_by"][task]
        rows = [row for row in summary["rows"] if row["task"] == task]
        measured = any(row["validation_by_rate"] for row in rows)  # not without validation examples
        charts = (front_chart(rows, metric, smaller), rate_chart(rows, chosen_by, small_chosen) if measured else "")
        printed = {} if published is None else {m: r.get(task) for m, r in published["rows"].items()}
        parts.append(
            {"task": task, "metric": metric, "smaller": smaller, "rows": _ranked(rows, smaller), "charts": charts}
            | {"printed": printed}
        )
    return fill(
        "comparison.html.j2",
        {"bytes": readable_bytes, "figure": _figure},
        summary=summary,
        parts=parts,
        published=published,
        headline=headline(summary),
        # A single rate is given, not chosen.
        chosen=any(len(row["validation_by_rate"]) > 1 for row in summary["rows"]),
        colours={name: place % COLOURS for place, name in enumerate(summary["methods"])},
        provenance=json.dumps(summary["provenance"], indent=2, ensure_ascii=False),
        all_smaller=all(summary["smaller_is_better"].values()),
        forgets=any(row["forgetting"] is not None for row in summary["rows"]),
    )


def headline(summary: Mapping[str, Any]) -> str:
    """Get the outcome in one sentence; where the seeds of the first two overlap, it says that they do."""
    said = []
    for task in summary["tasks"]:
        smaller = summary["smaller_is_better"][task]
        rows = [r for r in _ranked([r for r in summary["rows"] if r["task"] == task], smaller) if r["test"] is not None]
        if not rows:
            continue
        first, *others = rows
        words = f"{first['method']} {_figure(first['test'], smaller)}"
        if others:
            apart = first["high"] < others[0]["low"] if smaller else first["low"] > others[0]["high"]
            next_best = f"{others[0]['method']} {_figure(others[0]['test'], smaller)}"
            words += f" before {next_best}" + ("" if apart else ", within each other's spread")
        said.append(words if len(summary["tasks"]) == 1 else f"{task}: {words}")
    return "; ".join(said) + "." if said else "No run was finished."


def _ranked(rows: list[Mapping[str, Any]], smaller: bool) -> list[Mapping[str, Any]]:
    worst = float("inf")
    return sorted(rows, key=lambda r: worst if r["test"] is None else (r["test"] if smaller else -r["test"]))


def _figure(value: float | None, smaller: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if smaller else f"{100 * value:.2f}"

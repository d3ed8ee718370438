"""`write_comparison`: a comparison of methods as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..sweeps.paired import gain_words
from ..sweeps.summary import spread
from .comparison_charts import COLOURS, front_chart, rate_chart
from .frame import fill
from .run_page import readable_bytes


def write_comparison(summary: Mapping[str, Any], path: str | Path, published: Mapping[str, Any] | None = None) -> None:
    """Write a sweep's summary as a self-contained page, all or nothing.

    `published` adds a paper's figures to the measured ones: `source`, `rows` (method -> task -> figure as
    printed), `deviations`, `computed` (tables of name, head and rows). Everything is escaped. `MissingExtraError`
    without jinja2, `OutputError` if the file cannot be written.
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
        {"bytes": readable_bytes, "figure": _figure, "spread": spread, "gained": gain_words},
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
    """Get the outcome in one sentence: every method in its order, and which the seeds do not tell from the first."""
    said = []
    for task in summary["tasks"]:
        rows = [row for row in summary["rows"] if row["task"] == task]
        words = _order(rows, summary["smaller_is_better"][task])
        if words:
            said.append(words if len(summary["tasks"]) == 1 else f"{task}: {words}")
    if not said:
        return "No run has its test figures yet." if summary.get("planned") else "No run was finished."
    return "; ".join(said) + "."


def _order(rows: list[Mapping[str, Any]], smaller: bool) -> str:
    there = [row for row in _ranked(rows, smaller) if row["test"] is not None]
    if not there:
        return ""
    first, *others = there
    named = [f"{row['method']} {_figure(row['test'], smaller)}" for row in there]
    said = " before ".join([named[0], ", ".join(named[1:])]) if others else named[0]
    if others and all(row["seeds"] == 1 for row in there):
        said += " (one seed: differences may be chance)"
    else:
        close = [row["method"] for row in others if not _apart(first, row, smaller)]
        said += f" ({', '.join(close)}: within {first['method']}'s spread)" if close else ""
    missing = [row["method"] for row in rows if row["test"] is None]
    return said + (f"; without a figure: {', '.join(missing)}" if missing else "")


def _apart(first: Mapping[str, Any], other: Mapping[str, Any], smaller: bool) -> bool:
    """Ask whether every seed of the first is better than every seed of the other."""
    return bool(first["high"] < other["low"] if smaller else first["low"] > other["high"])


def _ranked(rows: list[Mapping[str, Any]], smaller: bool) -> list[Mapping[str, Any]]:
    worst = float("inf")
    return sorted(rows, key=lambda r: worst if r["test"] is None else (r["test"] if smaller else -r["test"]))


def _figure(value: float | None, smaller: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if smaller else f"{100 * value:.2f}"

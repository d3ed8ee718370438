"""`write_survey`: a survey as one HTML file that loads nothing and runs nothing, in the look of the run report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..surveys.adapter_survey import KEPT_ENERGY, AdapterSurvey, adapter_group_figures
from ..surveys.budget import BudgetRow
from ..surveys.intruders import INTRUDER_EPSILON, INTRUDER_K
from ..surveys.model_survey import ModelSurvey, group_figures
from .frame import fill
from .run_page import readable_bytes
from .survey_charts import Bar, log_bars, share_bars, spectra_chart


def write_survey(survey: ModelSurvey | AdapterSurvey, path: str | Path) -> None:
    """Write a survey as a self-contained HTML page, all or nothing.

    Names from files are escaped. `MissingExtraError` without jinja2, `OutputError` if it cannot be written.
    """
    write_atomically(path, render_survey(survey))


def render_survey(survey: ModelSurvey | AdapterSurvey) -> str:
    """Get the page as text."""
    parts = _model_parts(survey) if isinstance(survey, ModelSurvey) else _adapter_parts(survey)
    filters = {"bytes": readable_bytes, "seconds": readable_seconds, "share": share, "short": short}
    return fill("survey.html.j2", filters, survey=survey, **parts)


def _model_parts(survey: ModelSurvey) -> dict[str, Any]:
    charts = [
        (group, len(weights), spectra_chart(f"Singular values of {group}", [w.values for w in weights], survey.r))
        for group, weights in survey.groups().items()
    ]
    rows = survey.budget
    return {
        "kind": "model",
        "title": Path(survey.path).name or survey.path,
        "headline": model_headline(survey),
        "charts": charts,
        "groups": group_figures(survey),
        "trained": log_bars("Numbers trained", [Bar(r.method, r.trainable, f"{r.trainable:,}") for r in rows], ""),
        "memory": log_bars("Memory in training", [_memory_bar(row) for row in rows], "B"),
        "timed": any(row.decompose_seconds for row in rows),
        "partial": [row for row in rows if row.left_out],
    }


def _memory_bar(row: BudgetRow) -> Bar:
    return Bar(row.method, row.memory_bytes, readable_bytes(row.memory_bytes))


def _adapter_parts(survey: AdapterSurvey) -> dict[str, Any]:
    groups = adapter_group_figures(survey)
    charts = [
        (group, len(layers), spectra_chart(f"Singular values of the update of {group}", [x.values for x in layers]))
        for group, layers in survey.groups().items()
    ]
    overlaps = [
        (side, words, share_bars(f"Overlap with the {words}", bars))
        for side, words in (
            ("left", "base's strongest output directions"),
            ("right", "base's strongest input directions"),
        )
        if (bars := _overlap_bars(survey, groups, side))
    ]
    return {
        "kind": "adapter",
        "title": Path(survey.path).name or survey.path,
        "headline": adapter_headline(survey),
        "charts": charts,
        "groups": groups,
        "overlaps": overlaps,
        "stem": common_stem([layer.name for layer in survey.layers]),
        "widest": max((layer.relative or 0.0 for layer in survey.layers), default=0.0) or 1.0,
        "kept": KEPT_ENERGY,
        "k": INTRUDER_K,
        "epsilon": INTRUDER_EPSILON,
    }


def _overlap_bars(survey: AdapterSurvey, groups: list[dict[str, Any]], side: str) -> list[Bar]:
    return [
        Bar(row["group"], row[f"{side}_top"], share(row[f"{side}_top"]), row[f"{side}_chance"])
        for row in groups
        if f"{side}_top" in row
    ]


def model_headline(survey: ModelSurvey) -> str:
    """Get the most important fact about a model in one sentence."""
    rows = group_figures(survey)
    low, high = (pick(rows, key=lambda row: row["energy_at_r"]) for pick in (min, max))
    said = f"The top {survey.r} directions have {share(low['energy_at_r'])} of the energy of {low['group']}"
    return said + (f", and {share(high['energy_at_r'])} of that of {high['group']}." if len(rows) > 1 else ".")


def adapter_headline(survey: AdapterSurvey) -> str:
    """Get the most important fact about an adapter in one sentence."""
    changed = sum(layer.norm > 0 for layer in survey.layers)
    if not changed:
        return f"This adapter changes nothing: the updates of all {len(survey.layers)} layers are zero."
    said = f"A LoRA of rank {survey.suggested_r} would keep {KEPT_ENERGY:.0%} of this update's energy"
    relative = [layer.relative for layer in survey.layers if layer.relative is not None]
    if relative:
        said += f"; its weights moved by {share(min(relative))} to {share(max(relative))} of their norm"
    return said + "."


def common_stem(names: list[str]) -> str:
    """Get the dotted beginning that all names share, with its last dot; empty for one name."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(part + "." for part in shared) if len(names) > 1 else ""


def share(value: float | None) -> str:
    """Get a share in percent, with more digits where it is small; a dash for none."""
    if value is None:
        return "–"
    if value == 0 or value >= 0.01:
        return f"{value:.1%}"
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}"


def short(value: float | None) -> str:
    """Get a figure with three digits, without an exponent between 0.001 and 100,000; a dash for none."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def readable_seconds(seconds: float | None) -> str:
    """Get a time in words: 0.3 s, 12 s, 4 min, 1.5 h; a dash for none."""
    if seconds is None:
        return "–"
    if seconds < 99.5:
        if 0 < seconds < 0.05:
            return "<0.1 s"
        return "0" if seconds == 0 else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

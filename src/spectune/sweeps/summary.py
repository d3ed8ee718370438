"""`summarise`: the records of a sweep as one row for each task and method, and as Markdown.

The rate was chosen on validation; every other figure is of the runs at that rate. The summary is plain data, which
for JSON and the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..recipes.metrics import better_is_smaller
from .choice import chosen_rate, validation_means
from .config import SweepConfig, metric_of
from .paired import gain_words, gains
from .record import SweepRecord

FORMAT = 1
REPORTED = ("test", "lm_eval")
STEP = "step, ms (not comparable)"


def summarise(sweep: SweepConfig, records: Sequence[SweepRecord], planned: int | None = None) -> dict[str, Any]:
    """Get the sweep's outcome: rows, averages over the tasks, failed runs, and where the runs took place.

    `planned` is how many runs there will be, while the sweep still runs.
    """
    rows = [row(sweep, records, task, method) for task in sweep.tasks for method in sweep.methods]
    good = next((record for record in records if record.ok), None)
    reported = task_metrics(sweep, records, REPORTED, sweep.report or sweep.metric)
    chosen = task_metrics(sweep, records, ("validation",), sweep.metric)
    metric, chosen_by = (" or ".join(dict.fromkeys(names.values())) for names in (reported, chosen))
    found: dict[str, Any] = {
        "format": FORMAT,
        "title": sweep.title,
        "metric": metric,
        "chosen_by": chosen_by,
        "task_metrics": reported,
        "task_chosen_by": chosen,
        "smaller_is_better": {task: better_is_smaller(name) for task, name in reported.items()},
        "smaller_is_chosen": {task: better_is_smaller(name) for task, name in chosen.items()},
        "seeds": list(sweep.seeds),
        "tuning_seeds": len(sweep.seeds[: sweep.tuning_seeds]),
        "grids": {name: method.learning_rates for name, method in sweep.methods.items()},
        "tasks": list(sweep.tasks),
        "methods": list(sweep.methods),
        "rows": rows,
        "baseline": sweep.baseline,
        "gains": gains(sweep, records, rows, REPORTED)
        if len({better_is_smaller(name) for name in reported.values()}) == 1
        else [],
        # A mean of losses and accuracies would say nothing.
        "averages": averages(rows, list(sweep.methods))
        if len(sweep.tasks) > 1 and len({better_is_smaller(name) for name in reported.values()}) == 1
        else [],
        "failed": [
            {"run": f"{r.task}--{r.method}--{r.rate:g}--{r.seed}", "error": r.error} for r in records if r.error
        ],
        "stopped": [
            {"run": f"{r.task}--{r.method}--{r.rate:g}--{r.seed}", "reason": r.stopped.reason}
            for r in records
            if r.stopped
        ],
        "runs": len(records),
        "planned": planned,
        "device": good.found.device if good else "",
        "provenance": good.provenance if good else {},
        "says": [] if planned is None else [f"The sweep is not finished: {len(records)} of {planned} runs are done."],
    }
    found["says"] += remarks(sweep, rows, records)
    return found


def task_metrics(
    sweep: SweepConfig, records: Sequence[SweepRecord], splits: Sequence[str], name: str | None
) -> dict[str, str]:
    """Get the metric of each task: GLUE's tasks have their own."""
    found = {}
    for task in sweep.tasks:
        mine = [r for r in records if r.ok and r.task == task and any(split in r.metrics for split in splits)]
        found[task] = metric_of(mine[0].metrics, splits, name)[0] if mine else name or ""
    return found


def row(sweep: SweepConfig, records: Sequence[SweepRecord], task: str, method: str) -> dict[str, Any]:
    """Get the figures of one method on one task, at the rate chosen on validation; None if every run failed."""
    mine = [r for r in records if (r.task, r.method) == (task, method)]
    tuning = [r for r in mine if r.seed in sweep.seeds[: sweep.tuning_seeds]]
    rate = chosen_rate(tuning, sweep.metric)
    at = [r for r in mine if r.ok and r.rate == rate]
    scored = [r for r in at if any(part in r.metrics for part in REPORTED)]
    tests = [metric_of(r.metrics, REPORTED, sweep.report or sweep.metric)[1] for r in scored]
    means = validation_means(tuning, sweep.metric)
    grid = sorted({*sweep.methods[method].rates(task), *(r.rate for r in mine)})
    forgot = [r.forgetting for r in at if r.forgetting is not None]
    return {
        "task": task,
        "method": method,
        "kind": mine[0].kind if mine else "",
        "rate": rate,
        # A better rate may be outside the grid.
        "at_edge": len(grid) > 1 and rate in (grid[0], grid[-1]),
        "validation": _finite(means[rate]) if rate in means else None,
        "validation_by_rate": [[r, _finite(value)] for r, value in means.items()],
        "test": _finite(statistics.fmean(tests)) if tests else None,
        "spread": statistics.stdev(tests) if len(tests) > 1 and all(map(math.isfinite, tests)) else None,
        "low": _finite(min(tests)) if tests else None,
        "high": _finite(max(tests)) if tests else None,
        "seeds": len(tests),
        "trainable": at[0].found.trainable if at else None,
        "head": at[0].found.head if at else None,
        "total": at[0].found.total if at else None,
        "step_seconds": _median([r.found.step_seconds for r in at]),
        "peak_bytes": max((r.found.peak_bytes for r in at if r.found.peak_bytes is not None), default=None),
        "file_bytes": max((r.found.file_bytes for r in at if r.found.file_bytes is not None), default=None),
        "forgetting": statistics.fmean(forgot) if forgot else None,
        "failed": sum(bool(r.error) for r in mine),
    }


def averages(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Get each method's mean over the tasks; None if a task is missing, since means would not be comparable."""
    found = []
    for method in methods:
        values = [r["test"] for r in rows if r["method"] == method]
        whole = bool(values) and all(value is not None for value in values)
        found.append({"method": method, "test": statistics.fmean(values) if whole else None, "tasks": len(values)})
    return found


def remarks(sweep: SweepConfig, rows: Sequence[Mapping[str, Any]], records: Sequence[SweepRecord]) -> list[str]:
    """Get what a reader must know before believing the table, one sentence each."""
    counts = {len(method.rates(task)) for method in sweep.methods.values() for task in sweep.tasks}
    said = [] if len(counts) == 1 else ["The methods tried different numbers of learning rates."]
    if sweep.grow:
        said.append(f"A grid whose best rate was at its end was continued there, by at most {sweep.grow} rates.")
    edge = [f"{r['method']} ({r['task']})" for r in rows if r["at_edge"]]
    if edge:
        said.append(f"The chosen rate is at the end of its grid, so a better one may be outside: {', '.join(edge)}.")
    if len(sweep.seeds) == 1:
        said.append("One seed: differences may be chance.")
    elif len(sweep.seeds[: sweep.tuning_seeds]) < len(sweep.seeds):
        said.append(f"Rates were chosen with {len(sweep.seeds[: sweep.tuning_seeds])} of {len(sweep.seeds)} seeds.")
    stopped = [r.stopped for r in records if r.stopped]
    if stopped:
        done, whole = sum(s.step for s in stopped), sum(s.steps for s in stopped)
        said.append(
            f"{len(stopped)} runs were stopped early by their validation losses (stop: asha), after {done} of {whole} "
            f"steps; one of them could have become the best later."
        )
    jobs = max((r.jobs for r in records if r.ok), default=1)
    if len(sweep.methods) > 1:
        together = f"up to {jobs} runs worked at the same time" if jobs > 1 else "the runs were timed one after another"
        said.append(
            f"Step times are not comparable between methods: {together}, and the machine may have been busier in one "
            f"than in another. docs/speed.md has times that were measured in turn."
        )
    if not any(r.found.device != "cpu" for r in records if r.ok):
        said.append("Peak memory is that of the whole process.")
    if any(r.forgetting is None for r in records if r.ok):
        said.append("Forgetting (loss on general text) is measured for language models if the sweep names a text.")
    return said


def to_markdown(summary: Mapping[str, Any], published: Mapping[str, Any] | None = None) -> str:
    """Get the summary as Markdown: one table for each task, averages, failures, remarks, and what was published."""
    lines = [f"# {summary['title']}", "", _told(summary), ""]
    for task in summary["tasks"]:
        lines += [f"## {task}", ""] if len(summary["tasks"]) > 1 else []
        lines += _table(summary, [r for r in summary["rows"] if r["task"] == task])
    if summary["averages"]:
        lines += ["## Mean over the tasks", "", "| method | mean |", "| --- | ---: |"]
        lines += [f"| {r['method']} | {shown(r['test'], summary['metric'])} |" for r in summary["averages"]] + [""]
    if summary["gains"]:
        lines += _gains(summary)
    if summary["failed"]:
        lines += ["## Failed runs", "", *(f"- `{f['run']}`: {f['error']}" for f in summary["failed"]), ""]
    if summary["stopped"]:
        lines += ["## Stopped early", "", *(f"- `{s['run']}`: {s['reason']}" for s in summary["stopped"]), ""]
    lines += [f"- {sentence}" for sentence in summary["says"]]
    if published is not None:
        lines += ["", "## Published", "", str(published["source"]), ""]
        for name, figures in published["rows"].items():
            lines.append(f"- {name}: " + ", ".join(f"{task} {value}" for task, value in figures.items()))
        lines += ["", "Deviations of this run:", "", *(f"- {sentence}" for sentence in published["deviations"])]
    return "\n".join(lines).rstrip() + "\n"


def _gains(summary: Mapping[str, Any]) -> list[str]:
    scale = 1.0 if all(summary["smaller_is_better"].values()) else 100.0
    lines = [
        f"## Gain over {summary['baseline']}",
        "",
        "Paired by seed, mean over the tasks; above zero is better.",
        "",
    ]
    lines += ["| method | gain ± standard error | 95% bootstrap |", "| --- | ---: | ---: |"]
    cells = [(gain["method"], *gain_words(gain, scale)) for gain in summary["gains"]]
    return [*lines, *(f"| {' | '.join(row)} |" for row in cells), ""]


def _told(summary: Mapping[str, Any]) -> str:
    seeds = len(summary["seeds"])
    return f"Test {summary['metric']}, mean of the seeds ({seeds}) with lowest and highest; {rates_told(summary)}."


def rates_told(summary: Mapping[str, Any]) -> str:
    """Get how the learning rates came about."""
    if any(len(row["validation_by_rate"]) > 1 for row in summary["rows"]):
        return f"each method's learning rate is the best of its grid by validation {summary['chosen_by']}"
    return "each method ran at the one learning rate that was given for it"


def _table(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    forgets = any(row["forgetting"] is not None for row in rows)
    metric = summary["task_metrics"][rows[0]["task"]]
    names = ["method", f"test {metric}", "low to high", "seeds", "rate", "trained numbers", STEP]
    names += ["peak, MiB", "file, KiB", *(["forgetting, nats"] if forgets else [])]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    for row in rows:
        cells = [
            row["method"],
            shown(row["test"], metric),
            spread(row, metric),
            str(row["seeds"]),
            "–" if row["rate"] is None else f"{row['rate']:g}" + (" (end of grid)" if row["at_edge"] else ""),
            "–" if row["trainable"] is None else f"{row['trainable']:,}",
            "–" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
            "–" if row["file_bytes"] is None else f"{row['file_bytes'] / 2**10:,.0f}",
        ]
        cells += [f"{row['forgetting']:+.3f}" if row["forgetting"] is not None else "–"] if forgets else []
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def shown(value: float | None, metric: str) -> str:
    """Get a figure as text: losses plain, shares and correlations times 100, as in the papers."""
    if value is None:
        return "–"
    return f"{value:.4f}" if better_is_smaller(metric) else f"{100 * value:.2f}"


def spread(row: Mapping[str, Any], metric: str) -> str:
    """Get lowest and highest figure of a row in words; with one seed, or without figures, there is no range."""
    if row["test"] is None or row["low"] is None:
        return "–"
    if row["seeds"] == 1:
        return "one seed"
    low, high = (shown(row[key], metric) for key in ("low", "high"))
    return f"{low} to {high}" if low != high else f"{low} with every seed"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None

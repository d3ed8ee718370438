"""`write_report`: one run as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..runs.result import SHARES, Metric, RunResult
from .charts import bar_chart, loss_chart, spectrum_chart, step_chart, update_chart
from .frame import fill

# Examples of each kind that the page shows; it says how many there are. Chosen, not measured.
MOST_EXAMPLES = 12
# Classes up to which the table of right and answered classes is drawn; more are listed without it. Chosen.
MOST_CLASSES = 12
PEAK = "peak memory"
# Layers that the page names, those that moved farthest first. Chosen.
MOST_LAYERS = 8


def write_report(result: RunResult, path: str | Path) -> None:
    """Write the run as a self-contained HTML page, all or nothing.

    Everything that comes from the result is escaped. `MissingExtraError` without jinja2, `OutputError`
    where the file cannot be written.
    """
    write_atomically(path, render(result))


def render(result: RunResult) -> str:
    """Get the page as text."""
    return fill("run.html.j2", {"bytes": readable_bytes, "figure": figure, "shown": shown}, **_parts(result))


def _parts(result: RunResult) -> dict[str, Any]:
    shares = [metric for metric in figures(result) if metric.share]
    finite = [value for value in result.losses if math.isfinite(value)]
    return {
        "result": result,
        "headline": headline(result),
        "tiles": _tiles(result),
        "bars": bar_chart(shares, "Results", strong=len(shares) - 1) if shares else "",
        "notes": [metric for metric in shares if metric.note],
        "figures": [metric for metric in figures(result) if not metric.share],
        "loss": loss_chart(result.losses, validation=result.validation_losses) if result.losses else "",
        "rewards": step_chart(result.curves, "Reward") if result.curves else "",
        "updates": update_chart(result.updates) if result.updates else "",
        "farthest": sorted(result.updates, key=lambda update: -update.share)[:MOST_LAYERS],
        "lost_steps": len(result.losses) - len(finite),
        "spectra": [(layer.name, spectrum_chart(layer), _moved(layer.before, layer.after)) for layer in result.spectra],
        "largest": max((size.trainable for size in result.sizes), default=0) or 1,
        "matrix": result.confusion is not None and len(result.confusion.labels) <= MOST_CLASSES,
        "right": [example for example in result.examples if example.right],
        "wrong": [example for example in result.examples if not example.right],
        "most": MOST_EXAMPLES,
        "config": json.dumps(result.config, indent=2, ensure_ascii=False, default=str),
    }


def figures(result: RunResult) -> list[Metric]:
    """Get every figure of the page in order: baselines, the run's own, speed and memory.

    The last share is the run's result: the first metric of its test (else validation) examples.
    """
    main = main_figure(result)
    own = [
        Metric(name=f"{split} {name}", value=value, share=name in SHARES and 0 <= value <= 1)
        for split, metrics in result.metrics.items()
        for name, value in metrics.items()
    ]
    own = [metric for metric in own if metric != main] + ([main] if main else [])
    if result.step_seconds is not None:
        own.append(Metric(name="seconds a step", value=result.step_seconds, note="median", share=False))
    if result.peak_bytes is not None:
        own.append(Metric(name=PEAK, value=result.peak_bytes, note=result.device, share=False))
    return [*baselines(result), *own]


def baselines(result: RunResult) -> list[Metric]:
    """Get what to compare the main figure with: the run's baselines, and always answering the most frequent class."""
    main, confusion = main_figure(result), result.confusion
    if confusion is None or main is None or main.name != f"{confusion.split} accuracy":
        return result.compared
    label, share = confusion.most_frequent
    return [
        *result.compared,
        Metric(name=f"always {label}", value=share, note=f"the largest class of {confusion.split}"),
    ]


def main_figure(result: RunResult) -> Metric | None:
    """Get the run's first share on its test examples, else on its validation examples, else None."""
    for split in ("test", "validation"):
        for name, value in result.metrics.get(split, {}).items():
            if name in SHARES and 0 <= value <= 1:
                return Metric(name=f"{split} {name}", value=value)
    return None


def headline(result: RunResult) -> str:
    """Get the result in one sentence: its main figure, against the weakest and the strongest of what it is compared
    with, and the adapter's size; of a run that diverged, that."""
    if result.diverged:
        return result.diverged[:1].upper() + result.diverged[1:]
    main, said = main_figure(result), f"{result.method}, {result.steps:,} steps"
    if main is not None:
        said = f"{main.name}: {main.value:.1%}"
        ends = sorted((metric for metric in baselines(result) if metric.share), key=lambda metric: metric.value)
        rivals = ends if len(ends) < 2 else [ends[0], ends[-1]]
        if rivals:
            said += ", against " + " and ".join(f"{metric.value:.1%} ({metric.name})" for metric in rivals)
    if result.sizes:
        size = result.sizes[0]
        file = "" if size.file_bytes is None else f" in a file of {readable_bytes(size.file_bytes)}"
        said += f", with {size.trainable:,} trained numbers{file}"
    return said + "."


def _tiles(result: RunResult) -> list[tuple[str, str]]:
    """Get the few large figures under the headline; the gain is over the strongest baseline."""
    tiles, main = [], main_figure(result)
    rivals = [metric for metric in baselines(result) if metric.share]
    if rivals and main is not None:
        rival = max(rivals, key=lambda metric: metric.value)
        tiles.append((f"{100 * (main.value - rival.value):+.1f} points", f"over {rival.name}"))
    if result.sizes:
        tiles.append((f"{result.sizes[0].trainable:,}", "numbers trained"))
        if result.sizes[0].file_bytes is not None:
            tiles.append((readable_bytes(result.sizes[0].file_bytes), "adapter file"))
    if result.losses:
        tiles.append((f"{result.steps:,}", "steps"))
    if result.checks:
        tiles.append((f"{sum(check.ok for check in result.checks)} of {len(result.checks)}", "checks hold"))
    return tiles


def _moved(before: list[float], after: list[float]) -> str:
    """Get how far all singular values moved, as a share of the weight's norm."""
    norm = math.sqrt(sum(value * value for value in before))
    change = math.sqrt(sum((b - a) ** 2 for a, b in zip(before, after, strict=False)))
    return f"{change / norm:.2%}" if norm else "–"


def readable_bytes(size: int) -> str:
    """Get a file's size in words: 512 B, 24.0 KB, 1.3 MB (powers of 1000, as disks and hubs count)."""
    if size < 1000:
        return f"{size} B"
    power = next((p for p in (1, 2, 3) if size < 999.95 * 1000**p), 4)
    return f"{size / 1000**power:.1f} {'KMGT'[power - 1]}B"


def shown(metric: Metric) -> str:
    """Get a figure of the table as text."""
    return readable_bytes(int(metric.value)) if metric.name == PEAK else figure(metric.value)


def figure(value: float) -> str:
    """Get a figure that is not a share, with five digits."""
    return f"{value:,.5g}"

"""`write_report`: one run as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..runs.record import Metric, RunRecord
from .charts import bar_chart, loss_chart, spectrum_chart, update_chart
from .frame import fill

# Examples of each kind that the page shows; it says how many there are. Chosen, not measured.
MOST_EXAMPLES = 12
# Layers that the page names, those that moved farthest first. Chosen.
MOST_LAYERS = 8


def write_report(record: RunRecord, path: str | Path) -> None:
    """Write the run as a self-contained HTML page, whole or not at all.

    Everything that comes from the record is escaped. `MissingExtraError` without jinja2, `OutputError`
    where the file cannot be written.
    """
    write_atomically(path, render(record))


def render(record: RunRecord) -> str:
    """Get the page as text."""
    return fill("run.html.j2", {"bytes": readable_bytes, "figure": figure}, **_parts(record))


def _parts(record: RunRecord) -> dict[str, Any]:
    shares = [metric for metric in record.metrics if metric.share]
    finite = [value for value in record.loss if math.isfinite(value)]
    return {
        "record": record,
        "headline": headline(record),
        "tiles": _tiles(record, shares),
        "bars": bar_chart(shares, "Results", strong=len(shares) - 1) if shares else "",
        "notes": [metric for metric in shares if metric.note],
        "figures": [metric for metric in record.metrics if not metric.share],
        "loss": loss_chart(record.loss, validation=record.validation) if record.loss else "",
        "updates": update_chart(record.updates) if record.updates else "",
        "farthest": sorted(record.updates, key=lambda update: -update.share)[:MOST_LAYERS],
        "lost_steps": len(record.loss) - len(finite),
        "spectra": [(layer.name, spectrum_chart(layer), _moved(layer.before, layer.after)) for layer in record.spectra],
        "largest": max((size.trainable for size in record.sizes), default=0) or 1,
        "right": [example for example in record.examples if example.right],
        "wrong": [example for example in record.examples if not example.right],
        "most": MOST_EXAMPLES,
        "config": json.dumps(record.config, indent=2, ensure_ascii=False, default=str),
    }


def headline(record: RunRecord) -> str:
    """Get the result in one sentence: the record's own, or the last share, against the weakest and the strongest
    of the others, with the adapter's size."""
    if record.headline:
        return record.headline
    shares = [metric for metric in record.metrics if metric.share]
    said = f"{record.method}, {len(record.loss):,} steps"
    if shares:
        said = f"{shares[-1].name}: {shares[-1].value:.1%}"
    ends = sorted(shares[:-1], key=lambda metric: metric.value)
    if ends:
        rivals = ends if len(ends) < 2 else [ends[0], ends[-1]]
        said += ", against " + " and ".join(f"{metric.value:.1%} ({metric.name})" for metric in rivals)
    if record.sizes:
        size = record.sizes[0]
        file = "" if size.file_bytes is None else f" in a file of {readable_bytes(size.file_bytes)}"
        said += f", with {size.trainable:,} trained numbers{file}"
    return said + "."


def _tiles(record: RunRecord, shares: list[Metric]) -> list[tuple[str, str]]:
    """Get the few figures that stand large under the headline; the gain is over the strongest rival."""
    tiles = []
    if len(shares) > 1:
        rival = max(shares[:-1], key=lambda metric: metric.value)
        tiles.append((f"{100 * (shares[-1].value - rival.value):+.1f} points", f"over {rival.name}"))
    if record.sizes:
        tiles.append((f"{record.sizes[0].trainable:,}", "numbers trained"))
        if record.sizes[0].file_bytes is not None:
            tiles.append((readable_bytes(record.sizes[0].file_bytes), "adapter file"))
    if record.loss:
        tiles.append((f"{len(record.loss):,}", "steps"))
    if record.proofs:
        tiles.append((f"{sum(proof.ok for proof in record.proofs)} of {len(record.proofs)}", "proofs hold"))
    return tiles


def _moved(before: list[float], after: list[float]) -> str:
    """Say how far the singular values moved together, as a share of the weight's norm."""
    norm = math.sqrt(sum(value * value for value in before))
    change = math.sqrt(sum((b - a) ** 2 for a, b in zip(before, after, strict=False)))
    return f"{change / norm:.2%}" if norm else "–"


def readable_bytes(size: int) -> str:
    """Get a file's size in words: 512 B, 24.0 KB, 1.3 MB (powers of 1000, as disks and hubs count)."""
    if size < 1000:
        return f"{size} B"
    power = next((p for p in (1, 2, 3) if size < 999.95 * 1000**p), 4)
    return f"{size / 1000**power:.1f} {'KMGT'[power - 1]}B"


def figure(value: float) -> str:
    """Get a figure that is no share, with five digits."""
    return f"{value:,.5g}"

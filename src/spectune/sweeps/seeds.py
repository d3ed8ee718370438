"""`seeds_like`: the figures of a run's method over the seeds of its sweep, for the run's card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..runs.result import RESULT_FILE, RunResult
from .record import read_record
from .sweep_folder import ASKED, RECORDS, RUNS


def seeds_like(run: str | Path) -> dict[str, Any] | None:
    """Get mean and standard deviation over the seeds of the same task, method and rate, of a run in a sweep's folder.

    None for a run that is not in one, and where it is the only seed.
    """
    folder = Path(run).resolve()
    sweep = folder.parent.parent
    if folder.parent.name != RUNS or not (sweep / ASKED).is_file() or not (folder / RESULT_FILE).is_file():
        return None
    own = RunResult.read(folder)
    records = [record for path in sorted((sweep / RECORDS).glob("*.json")) if (record := read_record(path)).ok]
    mine = next((r for r in records if r.seed == own.seed and r.found.config == own.config), None)
    alike = [r for r in records if mine and (r.task, r.method, r.rate) == (mine.task, mine.method, mine.rate)]
    if mine is None or len(alike) < 2:
        return None
    names = sorted({(split, name) for r in alike for split, figures in r.metrics.items() for name in figures})
    metrics = []
    for split, name in names:
        values = [r.metrics[split][name] for r in alike if name in r.metrics.get(split, {})]
        if len(values) > 1:
            metrics.append((split, name, *_spread(values), len(values)))
    forgotten = [r.forgetting for r in alike if r.forgetting is not None]
    said = {"seeds": sorted(r.seed for r in alike), "rate": mine.rate, "metrics": metrics}
    return said | ({"forgetting": _spread(forgotten)} if len(forgotten) > 1 else {})


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return mean(values), stdev(values)

"""A sweep as `spectune compare` runs it, and its outcome as one results file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console

from spectune.checkpoint import write_atomically
from spectune.cli.comparison_files import run_under_bar, write_files
from spectune.sweeps import SweepConfig


def record_sweep(
    sweep: SweepConfig, work: Path, results: Path, published: Mapping[str, Any] | None = None, jobs: int = 1
) -> None:
    """Run what has not been run and write the summary with every run's figures.

    `minutes` is from the start of the first run to the end of the last one, pauses included.
    """
    console = Console()
    records = run_under_bar(sweep, work, console, jobs)
    ends = [datetime.fromisoformat(r.created).timestamp() for r in records]
    minutes = (max(ends) - min(end - r.seconds for end, r in zip(ends, records, strict=True))) / 60
    summary = write_files(sweep, records, work, console, published)
    del summary["provenance"]
    runs = [
        {"task": r.task, "method": r.method, "rate": r.rate, "seed": r.seed, "seconds": round(r.seconds, 2)}
        | {"metrics": r.metrics}
        for r in records
    ]
    record = {"what": sweep.title, **provenance(), "jobs": jobs, "minutes": round(minutes, 1)}
    record |= {"summary": summary, "runs": runs}
    write_atomically(results, json.dumps(record, indent=1) + "\n")

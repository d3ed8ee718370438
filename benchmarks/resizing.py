"""LoRAs with fewer numbers: what their task keeps, by rank, by energy over all layers, and by calibration.

    python benchmarks/resizing.py --runs FOLDER... [--shares 0.5 0.25 0.125] [--work FOLDER]

FOLDERs are runs with a LoRA each (`benchmarks/merging.py` leaves five: SST-2, CoLA, MRPC, STS-B, languages, r = 8 on
MiniLM). Each is cut to the same share of its numbers in three ways, written, loaded and measured on test. Shares are those of
a lower rank, so that "rank" cuts to exactly as many numbers. Writes benchmarks/results/resizing.json; nothing is chosen
on test: the share is given, and calibration reads training examples only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from provenance import provenance

from spectune.checkpoint import read_lora, write_atomically
from spectune.extraction import resize_lora
from spectune.runs.company import Kept
from spectune.surveys.direction_scores import scores_of

RESULT = Path(__file__).parent / "results" / "resizing.json"


def ways(run: Path, share: float, rank: int) -> dict[str, dict[str, Any]]:
    """Get way of cutting -> the options of `resize_lora`."""
    return {
        "rank": {"rank": max(1, round(share * rank))},
        "energy over all layers": {"share": share},
        "calibrated": {"share": share, "scores": scores_of(run, run / "adapter")},
    }


def measured(run: Path, shares: list[float], work: Path) -> dict[str, Any]:
    """Get one run's figures: its own, the untouched body's, and each way's at each share."""
    lora, kept = read_lora(run / "adapter"), Kept.of(run)
    rank = max(layer.rank for layer in lora.layers.values())
    rows = []
    for share in shares:
        for way, options in ways(run, share, rank).items():
            name = f"{way}, {share:g}"
            done = resize_lora(lora.path, work / f"{run.name}-{name.replace(' ', '-')}", overwrite=True, **options)
            numbers = read_lora(done.path).trained_count
            row = {"way": way, "share": share, "numbers": numbers, "kept": kept.measure(name, done.path)}
            ranks = [layer.rank for layer in done.layers]
            rows.append({**row, "ranks": [min(ranks), max(ranks)], "worst_loss_of_dW": done.worst_loss})
            print(run.name, rows[-1], flush=True)
    return {
        "run": run.name,
        "metric": kept.metric,
        "own": kept.own,
        "numbers": lora.trained_count,
        "untouched": kept.share("untouched body"),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--work", type=Path, default=Path("resizing"))
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"what": "LoRAs cut to fewer numbers, share of their own test score", **provenance()}
    record["tasks"] = []
    for run in asked.runs:
        record["tasks"].append(measured(run, asked.shares, asked.work))
        write_atomically(asked.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

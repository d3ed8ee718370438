"""LoRAs with fewer numbers: what their task keeps, by rank, by energy over all layers, and by calibration.

    python benchmarks/resizing.py --runs FOLDER... [--shares 0.5 0.25 0.125] [--work FOLDER]

FOLDERs are runs with a LoRA each (`benchmarks/merging.py` leaves five: SST-2, CoLA, MRPC, STS-B, languages, r = 8 on
MiniLM). Each is cut to the same share of its numbers in three ways, written, loaded and measured on test. The shares
are those of a lower rank, so that "rank" leaves exactly as many numbers. Nothing is chosen on test: the share is given,
and calibration reads training examples only. Writes benchmarks/results/resizing.json; a
call with other --shares adds to it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from provenance import provenance

from spectune.checkpoint import read_lora, write_atomically
from spectune.extraction import resize_lora
from spectune.runs.company import UNTOUCHED, Kept
from spectune.surveys.direction_scores import scores_of

RESULT = Path(__file__).parent / "results" / "resizing.json"


def ways(run: Path, share: float, rank: int) -> dict[str, dict[str, Any]]:
    """Get way of cutting -> the options of `resize_lora`; no rank is below 1."""
    by_rank = {"rank": {"rank": round(share * rank)}} if share * rank >= 1 else {}
    return by_rank | {
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
            row = {"way": way, "share": share, "numbers": read_lora(done.path).trained_count}
            row |= {"kept": kept.measure(name, done.path), "layers": sum(layer.rank > 0 for layer in done.layers)}
            rows.append({**row, "largest_rank": max(layer.rank for layer in done.layers)})
            print(run.name, rows[-1], flush=True)
    found = {"run": run.name, "metric": kept.metric, "own": kept.own, "numbers": lora.trained_count}
    return {**found, "untouched": kept.share(UNTOUCHED), "rows": rows}


def added(record: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a run's rows into the record, beside those of other shares."""
    before = next((task for task in record["tasks"] if task["run"] == found["run"]), None)
    if before is None:
        record["tasks"].append(found)
        return
    new = {(row["way"], row["share"]) for row in found["rows"]}
    before["rows"] = [row for row in before["rows"] if (row["way"], row["share"]) not in new] + found["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--work", type=Path, default=Path("resizing"))
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(asked.output.read_text()) if asked.output.exists() else {"tasks": []}
    record |= {"what": "LoRAs cut to fewer numbers, share of their own test score", **provenance()}
    for run in asked.runs:
        added(record, measured(run, asked.shares, asked.work))
        write_atomically(asked.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

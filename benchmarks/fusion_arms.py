"""What both fusion benchmarks share: the adapters, the rules, and how figures become rows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import provenance

from spectune import fuse
from spectune.checkpoint import write_atomically
from spectune.fusion import disjoint_schedule

RESULTS = Path(__file__).parent / "results" / "fusion.json"
PARTS, R = 3, 8
METHODS = ("spectral_a", "lora", "orthogonal_adaptation")


@dataclass(frozen=True)
class Arm:
    """One way to fuse."""

    method: str
    rule: str
    weight: float | None
    """None is 1/N, the default of every rule."""

    @property
    def name(self) -> str:
        return f"{self.rule} of {self.method}, weights {'1/N' if self.weight is None else '1'}"


# Rule average at weight 1 on spectral_a adapters of disjoint columns is the update of rule spectral at weight 1. The
# weights of rule gradient only say whose error counts more, so it has one row for each kind of adapter.
ARMS = (
    Arm("spectral_a", "spectral", 1.0),
    Arm("spectral_a", "spectral", None),
    Arm("spectral_a", "average", None),
    Arm("spectral_a", "gradient", None),
    Arm("lora", "average", 1.0),
    Arm("lora", "average", None),
    Arm("lora", "gradient", None),
    Arm("orthogonal_adaptation", "orthogonal", 1.0),
    Arm("orthogonal_adaptation", "orthogonal", None),
)


def options_of(method: str, place: int, targets: Sequence[str], orthogonal: Mapping[str, Any]) -> dict[str, Any]:
    """Get the adapter of the concept or task at a place; alpha = r, so that a LoRA is B A and nothing else.

    `orthogonal` is the size of `orthogonal_adaptation` (r, rank_pattern), which trains O r numbers and not (O + I) r.
    """
    common: dict[str, Any] = {"target_modules": list(targets)}
    if method == "lora":
        return common | {"peft_type": "LORA", "r": R, "lora_alpha": R}
    if method == "spectral_a":
        columns = list(disjoint_schedule(concepts=PARTS, r=R).columns[place])
        return common | {"method": method, "r": R, "columns": columns}
    return common | {"method": method, "concept": place, **orthogonal}


def cached(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Get what a finished run left in FOLDER.json, or run it."""
    path = folder.with_name(folder.name + ".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(make(), indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    print(path.stem, {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def refuse_other_settings(work: Path, sizes: dict[str, Any]) -> None:
    """End the program where --work holds runs of other sizes, which would be taken for these."""
    found = cached(work / "settings", lambda: sizes)
    if found != sizes:
        raise SystemExit(f"{work}: it holds runs with {found}, asked for {sizes}. Give another --work.")


def fuse_arm(arm: Arm, adapters: Sequence[Path], base: Path, activations: Any, output: Path) -> dict[str, Any]:
    """Fuse and save; get the seconds of both together and the largest rank."""
    started = time.perf_counter()
    fused = fuse(
        adapters,
        rule=arm.rule,
        weights=arm.weight,
        base=base,
        activations=activations if arm.rule == "gradient" else None,
    )
    saved = fused.save(output, overwrite=True)
    return {"seconds": time.perf_counter() - started, "rank": saved.max_rank}


def best_rate(tries: Mapping[float, float]) -> float:
    """Get the rate with the highest figure; of equals the smallest."""
    return min(tries, key=lambda rate: (-tries[rate], rate))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Get mean, lowest and highest."""
    return {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values)}


def record_part(part: str, found: dict[str, Any], results: Path) -> None:
    """Put one part into the results file and leave the other as it is."""
    record = json.loads(results.read_text()) if results.exists() else {}
    record[part] = {**found, **provenance()}
    results.parent.mkdir(exist_ok=True)
    write_atomically(results, json.dumps(record, indent=1) + "\n")


Scores = Mapping[str, Mapping[str, float]]
"""Concept or task -> figure -> share of right answers, from 0 to 1."""


def mean_over_parts(scores: Sequence[Scores], figure: str) -> list[float]:
    """Get one number for each seed."""
    return [statistics.mean(figures[figure] for figures in own.values()) for own in scores]


def without_adapter(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Get what is right with words or heads alone on the untouched body, as if a fusion kept nothing."""
    scores: list[Scores] = [run["scores"] for run in runs]
    return {figure: spread(mean_over_parts(scores, figure)) for figure in next(iter(scores[0].values()))}


def row_of(arm: Arm, before: Sequence[Scores], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Get the row of one arm out of one entry for each seed; `runs` holds "scores" and the seconds."""
    after: list[Scores] = [run["scores"] for run in runs]
    row: dict[str, Any] = {"name": arm.name, "method": arm.method, "rule": arm.rule, "weight": arm.weight}
    for figure in next(iter(before[0].values())):
        means = [mean_over_parts(side, figure) for side in (before, after)]
        row[figure] = {
            "before": spread(means[0]),
            "after": spread(means[1]),
            "drop": spread([old - new for old, new in zip(*means, strict=True)]),
            "each": {part: _of_part(before, after, part, figure) for part in before[0]},
        }
    row["fuse_seconds"] = statistics.median(run["seconds"] for run in runs)
    row["gram_seconds"] = statistics.median(run["gram_seconds"] for run in runs)
    row["rank"] = max(run["rank"] for run in runs)
    return row


def _of_part(before: Sequence[Scores], after: Sequence[Scores], part: str, figure: str) -> dict[str, Any]:
    old, new = ([scores[part][figure] for scores in side] for side in (before, after))
    return {"before": spread(old), "after": spread(new), "drop": spread([o - n for o, n in zip(old, new, strict=True)])}

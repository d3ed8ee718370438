"""Three concepts of the glyph model, LoRAs fused by rules that look at the merged model, with and without the base.

    python benchmarks/fusion_behind.py --work FOLDER [--base FOLDER] [--judge FILE] [--seeds 0 1 2]

The LoRAs are those of benchmarks/fusion.py, at the rate that it chose; --work may be the same folder. Rules that look
at examples get what the UNet is called with while each concept draws its own prompts, and `keep` what it is called with
while the base draws prompts of its own, others than the judged ones. How much the base counts is chosen with a training
and sampling seed of its own: the best mean of identity and base prompts. Goes on when started again. Writes the part
"behind" of benchmarks/results/fusion.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusion import TRY, Bench, base_prompts, options, own_prompts, prepared, word_of
from fusion_arms import cached, record_part, spread

from examples.glyphs.outlines import CONCEPTS
from spectune import fuse
from spectune.concepts.pipeline import open_pipeline

KEPT_PROMPTS = 24
# Weight of each concept; the base has 1. The default is 1/3.
WEIGHTS = [1 / 9, 1 / 3, 1.0, 3.0, 10.0]


@dataclass(frozen=True)
class Behind:
    """One way to fuse."""

    rule: str
    keeps: bool = False
    weight: float | None = None

    @property
    def name(self) -> str:
        return self.rule + (f", keep, weights {self.weight:.2g}" if self.keeps else "")


def merged(bench: Bench, arm: Behind, folders: Sequence[Path], seed: int) -> dict[str, Any]:
    """Fuse the concepts of one seed and get their figures."""
    started, more = time.perf_counter(), {}
    if arm.rule in ("match", "sequential"):
        more = {
            "model": open_pipeline(bench.base).unet,
            "examples": [bench.calls([f], own_prompts(c), seed)[1] for f, c in zip(folders, CONCEPTS, strict=True)],
        }
        if arm.keeps:
            more["keep"] = bench.calls([], base_prompts(KEPT_PROMPTS, seed=1000 + seed), seed)[1]
    elif arm.rule == "gradient":
        more = {"activations": [bench.grams(f, c, seed) for f, c in zip(folders, CONCEPTS, strict=True)]}
    whole = bench.work / f"behind-{seed}-{arm.name}"
    adapters = [folder / "adapter" / "unet" for folder in folders]
    fused = fuse(adapters, rule=arm.rule, weights=arm.weight, base=bench.base / "unet", **more)
    rank = fused.save(whole / "unet", overwrite=True).max_rank
    found = bench.look([whole, *map(word_of, folders)], list(CONCEPTS), seed)
    return found | {"rank": rank, "seconds": time.perf_counter() - started}


def shares(found: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Get what is kept of each figure: after, of what each concept's own adapter had."""
    own = {concept: scores for run in before for concept, scores in run["scores"].items()}
    kept = {
        figure: statistics.mean(after[figure] for after in found["scores"].values())
        / (statistics.mean(scores[figure] for scores in own.values()) or 1.0)
        for figure in ("alone", "in company")
    }
    return kept | {"base prompts": found["base prompts"]}


def measure(bench: Bench, seeds: Sequence[int], rate: float) -> dict[str, Any]:
    """Get the choice of the weight and the rows, running what has not been run."""

    def lora(seed: int) -> tuple[list[Path], list[dict[str, Any]]]:
        folders = [bench.folder("lora", rate, concept, seed) for concept in CONCEPTS]
        done = [
            cached(folder, partial(bench.train, "lora", rate, concept, seed))
            for folder, concept in zip(folders, CONCEPTS, strict=True)
        ]
        return folders, done

    def look(arm: Behind, seed: int) -> dict[str, float]:
        folders, before = lora(seed)
        path = bench.work / f"behind-{seed}-{arm.name}"
        return shares(cached(path, partial(merged, bench, arm, folders, seed)), before)

    tries = {weight: look(Behind("match", True, weight), TRY) for weight in WEIGHTS}
    best = max(tries, key=lambda weight: statistics.mean((tries[weight]["alone"], tries[weight]["base prompts"])))
    arms = [Behind("average"), Behind("gradient"), Behind("match")]
    arms += [Behind("sequential", True, best), Behind("match", True, best)]
    rows = []
    for arm in arms:
        found = [look(arm, seed) for seed in seeds]
        rows.append({"name": arm.name} | {key: spread([one[key] for one in found]) for key in found[0]})
    before = [lora(seed)[1] for seed in seeds]
    own = {
        figure: spread([statistics.mean(next(iter(r["scores"].values()))[figure] for r in runs) for runs in before])
        for figure in ("alone", "in company")
    }
    untouched = cached(bench.work / "base", lambda: bench.look([], [], 0))["base prompts"]
    chosen = {
        "kept prompts": KEPT_PROMPTS,
        "tries": {f"{weight:.2g}": found for weight, found in tries.items()},
        "weight": best,
    }
    return chosen | {"seeds": len(seeds), "own": own, "base prompts of the base": untouched, "rows": rows}


def main() -> None:
    told = options(__doc__).parse_args()
    known = json.loads(told.results.read_text("utf-8"))["glyphs"]
    sizes = {name: known[name] for name in ("sampling_steps", "steps", "batch_size", "pictures")}
    rows = measure(prepared(told, sizes), told.seeds, known["rates"]["lora"])
    record_part("behind", {**sizes, **rows}, told.results)


if __name__ == "__main__":
    main()

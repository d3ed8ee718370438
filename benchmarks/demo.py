"""The demo's task with every method: rates chosen on the validation part, accuracy reported on the test part.

    python benchmarks/demo.py [--seeds 0 1 2] [--methods frozen spectral_a lora ...] [--steps 150]

Writes benchmarks/results/demo.json after every run, and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from spectune.demo import LANGUAGES, DemoOptions, write_languages
from spectune.recipes import parse_config
from spectune.runs import run

RESULTS = Path(__file__).parent / "results" / "demo.json"
# Rates in steps of about three around each method's own default; the same number of tries for each.
GRIDS: dict[str, list[float]] = {
    "frozen": [0.0],
    "spectral_a": [2e-4, 5e-4, 1.2e-3],
    "lora": [1e-3, 2e-3, 5e-3],
    "svft": [1e-2, 3e-2, 1e-1],
    "spectral_r": [1e-2, 3e-2, 1e-1],
}


LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def run_once(method: str, rate: float, seed: int, steps: int, files: dict[str, Any]) -> dict[str, Any]:
    spectral = method not in ("frozen", "lora")
    options = DemoOptions(method=method if spectral else None, steps=steps, rate=rate or None, seed=seed)
    values = options.values(files)
    values["data"]["validation"] = files["validation"]
    if method == "frozen":
        values["adapter"] = "head"
        del values["training"]["learning_rate"]
    elif method == "lora":
        values["adapter"] = LORA | {"target_modules": values["adapter"]["target_modules"]}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(parse_config(values), Path(folder, "run"))
    figures = {split: result.metrics[split]["accuracy"] for split in ("validation", "test")}
    seconds = time.perf_counter() - started
    return {"method": method, "rate": rate, "seed": seed, "seconds": seconds, "trained": result.trainable, **figures}


def save(runs: list[dict[str, Any]], steps: int) -> None:
    chosen = {}
    for method in GRIDS:
        tries = [r for r in runs if r["method"] == method]
        if not tries:
            continue
        rate = max((r for r in tries if r["seed"] == 0), key=lambda r: r["validation"])["rate"]
        tests = [r["test"] for r in tries if r["rate"] == rate]
        chosen[method] = {
            "rate": rate,
            "trained": tries[0]["trained"],
            "test_mean": statistics.mean(tests),
            "test_spread": [min(tests), max(tests)],
            "seeds": len(tests),
        }
    record = {
        "what": "24 languages, all-MiniLM-L6-v2; rate chosen on validation with seed 0, test accuracy over the seeds",
        "steps": steps,
        **provenance(),
        "chosen": chosen,
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    work = tempfile.TemporaryDirectory()
    written = {split: str(path) for split, path in write_languages(Path(work.name)).items()}
    files: dict[str, Any] = written | {"labels": list(LANGUAGES.values())}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"steps": asked.steps, "runs": []}
    runs = old["runs"] if old["steps"] == asked.steps else []

    def once(method: str, rate: float, seed: int) -> dict[str, Any]:
        done = [r for r in runs if (r["method"], r["rate"], r["seed"]) == (method, rate, seed)]
        if not done:
            runs.append(run_once(method, rate, seed, asked.steps, files))
            save(runs, asked.steps)
            done = runs[-1:]
        print({k: v if not isinstance(v, float) else round(v, 4) for k, v in done[0].items()}, flush=True)
        return done[0]

    for method in asked.methods:
        best = max((once(method, rate, 0) for rate in GRIDS[method]), key=lambda r: r["validation"])
        for seed in asked.seeds:
            once(method, best["rate"], seed)


if __name__ == "__main__":
    main()

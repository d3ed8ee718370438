"""How much the rate and the rank matter: one task, LoRA, a core, and SpecAdapt with and without its two rules.

    python benchmarks/sensitivity.py --data FOLDER [--work FOLDER] [--jobs N] [--ranks …] [--seeds …]

SST-2 (sst2_train.jsonl.gz in FOLDER), 1,024 training rows, two epochs, all-MiniLM-L6-v2, a fitted head; query, key and
value are adapted. Ranks 2 to 128; a core has as many numbers as LoRA of that rank: P = (768 r)^(1/2), so no rank above
384 / 2. Each rank is run at 1/10 to 10 times one rate. LoRA's is 1e-3, with alpha = 2 r: for r = 8 the best of three on
two tasks of data_spectra.json, while on SST-2 with 2,000 rows 3e-3 is better. SpecAdapt's is its default, and so is a
core's, which falls with its size. SpecAdapt claims that its guided decay makes the rank matter less, and that its
gradient norm makes the rate matter less; 0.39 is the decay of its paper.
Scores are accuracy on 1,000 validation rows. Goes on when started again. Writes benchmarks/results/sensitivity.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from data_spectra import QKV, tasks, with_rows
from recorded_sweep import record_sweep

from spectune.demo import base_folder
from spectune.sweeps import parse_sweep

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
RANKS = [2, 8, 32, 128]
FACTORS = [0.1, 0.3, 1.0, 3.0, 10.0]
RULES = {"singular_decay": 0.39, "grad_norm": "rms"}


def arms(rank: int) -> dict[str, tuple[dict[str, Any], float]]:
    """Get name -> adapter and middle rate."""
    P = round(math.sqrt(768 * rank))
    core = {"method": "svft", "pattern": "dense", "basis_rank": P, "directions": "gradient"}
    found: dict[str, tuple[dict[str, Any], float]] = {
        "lora": ({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}, 1e-3),
        "core": (core, 3e-2 / math.sqrt(P)),
        "specadapt": ({"method": "specadapt", "r": rank}, 3e-3),
        "specadapt_rules": ({"method": "specadapt", "r": rank, **RULES}, 3e-3),
    }
    return {name: (adapter | {"target_modules": QKV}, rate) for name, (adapter, rate) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("sensitivity"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    methods = {
        f"{name}-{rank}": {"adapter": adapter, "learning_rates": [float(f"{f * rate:.2g}") for f in FACTORS]}
        for rank in asked.ranks
        for name, (adapter, rate) in arms(rank).items()
    }
    sweep = {
        "title": "How much the rate and the rank matter: SST-2, MiniLM, 1,024 rows",
        "run": {
            "recipe": "text_classification",
            "model": str(base_folder()),
            "pooling": "mean",
            "training": {"batch_size": 32, "head_first": True, "head_learning_rate": 1e-3},
        },
        "tasks": {"sst2": with_rows(tasks(["sst2"], asked.data, asked.work)["sst2"], 1024, 2)},
        "methods": methods,
        "baseline": "lora-8" if 8 in asked.ranks else None,
        "seeds": asked.seeds,
        "tuning_seeds": len(asked.seeds),
        "keep": "nothing",
    }
    record_sweep(parse_sweep(sweep), asked.work / "sweep", RESULTS, None, asked.jobs)


if __name__ == "__main__":
    main()

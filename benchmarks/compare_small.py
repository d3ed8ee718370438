"""Six ways of tuning on few-shot digits: rates chosen on validation, accuracy on test, every run in its own process.

    python benchmarks/compare_small.py [--work FOLDER] [--jobs N]

A vision transformer of four layers learns the digits 0 to 5 first; then 10 images each of 6 to 9 are to be learned.
Writes benchmarks/results/compare_small.json, and in FOLDER what `spectune compare` writes; goes on when started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recorded_sweep import record_sweep

from spectune.papers.small_models import digits
from spectune.sweeps import parse_sweep

RESULTS = Path(__file__).parent / "results" / "compare_small.json"
LINEAR = {"target_modules": "all-linear"}
# Three tries for each method, four or five times apart, and up to two more where the best stands at an end; guessed
# before the sweep, not moved after it.
METHODS: dict[str, Any] = {
    "spectral_a": {"adapter": {"method": "spectral_a", "r": 4, **LINEAR}, "learning_rates": [1e-3, 4e-3, 1.6e-2]},
    "spectral_r": {"adapter": {"method": "spectral_r", "r": 8, **LINEAR}, "learning_rates": [1e-2, 4e-2, 1.6e-1]},
    "svft": {
        "adapter": {"method": "svft", "pattern": "banded", "off_diagonals": 2, **LINEAR},
        "learning_rates": [1e-2, 4e-2, 1.6e-1],
    },
    "lora": {
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **LINEAR},
        "learning_rates": [1e-3, 4e-3, 1.6e-2],
    },
    "dora": {
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True, **LINEAR},
        "learning_rates": [1e-3, 4e-3, 1.6e-2],
    },
    "full": {"adapter": "none", "learning_rates": [1e-4, 5e-4, 2e-3]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("compare_small"))
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    made = asked.work.resolve() / "made"
    made.mkdir(parents=True, exist_ok=True)
    found = digits(made)
    training = {"steps": 100, "batch_size": 20, "warmup": 0.1, "head_learning_rate": 4e-3, "save_every": 1000}
    data = {"train": found["new_digits"], "augment": False}
    sweep = parse_sweep(
        {
            "title": "Few-shot digits: 10 images each of 6 to 9, a small vision transformer that knows 0 to 5",
            "run": {"recipe": "image_classification", "model": found["vit"], "data": data, "training": training},
            "tasks": {"digits": {}},
            "methods": METHODS,
            "seeds": [0, 1],
            "grow": 2,
            "metric": "accuracy",
        }
    )
    record_sweep(sweep, asked.work, RESULTS, jobs=asked.jobs)


if __name__ == "__main__":
    main()

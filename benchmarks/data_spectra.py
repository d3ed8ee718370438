"""Cores in directions of the data against LoRA, at equal trained numbers: GLUE tasks and 24 languages on MiniLM.

    python benchmarks/data_spectra.py --data FOLDER [--work FOLDER] [--jobs N] [--tasks …] [--arms …] [--seeds …]

Goes on when started again; `--tasks` and `--arms` choose a part of the table. FOLDER holds sst2_train, cola_train,
mrpc_train and rte_train, each .jsonl.gz, with GLUE's columns. Each task is split once, by a fixed seed: test rows, then
validation rows, and out of the rest the run's seed draws 2,000 training rows (--rows). Every arm begins with a fitted
head. With fewer rows a run repeats them until it has made 64 steps: `--rows 16 64 256 --arms limited_lora
limited_core_gradient limited_core_activation` is the table of limited data.
Writes benchmarks/results/data_spectra.json (--output).
"""

from __future__ import annotations

import argparse
import gzip
import math
import random
from pathlib import Path
from typing import Any

from recorded_sweep import record_sweep

from spectune.demo import base_folder, write_languages
from spectune.sweeps import parse_sweep

RESULTS = Path(__file__).parent / "results" / "data_spectra.json"
SPLIT_SEED = 0
BATCH = 32
FEWEST_STEPS = 64  # Two epochs of 1,024 rows; fewer rows are seen more often.
QKV = ["query", "key", "value"]
EVERY = r".*\.(query|key|value|output\.dense|intermediate\.dense)"
PAIR = {"text": "sentence1", "text_pair": "sentence2"}
# File, the columns of its texts, test rows, validation rows.
GLUE: dict[str, tuple[str, dict[str, str], int, int]] = {
    "sst2": ("sst2_train", {"text": "sentence"}, 3000, 1000),
    "cola": ("cola_train", {"text": "sentence"}, 3000, 1000),
    "mrpc": ("mrpc_train", PAIR, 1200, 400),
    "rte": ("rte_train", PAIR, 900, 300),
}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": QKV}
CORE = {"method": "svft", "pattern": "dense", "basis_rank": 78, "target_modules": QKV}
TENTH = CORE | {"basis_rank": 17, "target_modules": EVERY}
CHOSEN = {"method": "svft", "pattern": "chosen", "directions": "gradient", "target_modules": EVERY}
SHARED = {"method": "one_sided", "share": "kind", "directions": "gradient", "target_modules": EVERY}
# 18 weights of 384 x 384: LoRA r = 8 trains 110,592 numbers, a core of 78 x 78 109,512, r = 1 13,824, 27 x 27 13,122.
# Over all 36 linear weights of the body a core of 55 x 55 trains 108,900; LoRA r = 1 41,472 and r = 3 124,416.
ARMS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "lora": (LORA, [3e-4, 1e-3, 3e-3, 6e-3]),
    "lora_r1": (LORA | {"r": 1, "lora_alpha": 2}, [1e-3, 3e-3, 1e-2]),
    "lora_every": (LORA | {"r": 3, "lora_alpha": 6, "target_modules": EVERY}, [1e-3, 3e-3, 6e-3]),
    "dora": (LORA | {"use_dora": True}, [1e-3, 3e-3, 6e-3]),
    "spectral_a": ({"method": "spectral_a", "r": 8, "target_modules": QKV}, [4e-4, 1.2e-3, 3.6e-3]),
    "core_weight": (CORE, [3e-3, 1e-2]),
    "core_gradient": (CORE | {"directions": "gradient"}, [3e-3]),
    "core_mean": (CORE | {"directions": "gradient_mean"}, [3e-3]),
    "core_activation": (CORE | {"directions": "activation"}, [3e-3]),
    "core_gradient_27": (CORE | {"directions": "gradient", "basis_rank": 27}, [1e-2]),
    "core_gradient_every": (CORE | {"directions": "gradient", "basis_rank": 55, "target_modules": EVERY}, [3e-3]),
    # A tenth (10,404 numbers) and 1% (1,296) of LoRA r = 8's, at the default rate for the size: .24 / P.
    "core_gradient_every_17": (CORE | {"directions": "gradient", "basis_rank": 17, "target_modules": EVERY}, [1.4e-2]),
    "core_gradient_every_6": (CORE | {"directions": "gradient", "basis_rank": 6, "target_modules": EVERY}, [4e-2]),
    # The same numbers with a lower rate, in other directions, in other forms, and on query, key and value alone.
    "tenth_gradient": (TENTH | {"directions": "gradient"}, [3.5e-3, 7e-3]),
    "tenth_mean": (TENTH | {"directions": "gradient_mean"}, [7e-3]),
    "tenth_activation": (TENTH | {"directions": "activation"}, [7e-3]),
    "tenth_chosen": (CHOSEN | {"basis_rank": 55, "places": 289}, [7e-3]),
    "tenth_shared": (SHARED | {"r": 3}, [1e-3, 3e-3, 1e-2]),
    "tenth_qkv": (CORE | {"directions": "gradient", "basis_rank": 24}, [5e-3, 1e-2]),
    "percent_qkv": (CORE | {"directions": "gradient", "basis_rank": 8}, [3e-2]),
    "core_activation_every": (CORE | {"directions": "activation", "basis_rank": 55, "target_modules": EVERY}, [3e-3]),
    # Few rows: one grid for all three.
    "limited_lora": (LORA, [1e-3, 3e-3, 1e-2]),
    "limited_core_gradient": (CORE | {"directions": "gradient"}, [1e-3, 3e-3, 1e-2]),
    "limited_core_activation": (CORE | {"directions": "activation"}, [1e-3, 3e-3, 1e-2]),
    "full": ("none", [3e-5, 1e-4]),  # type: ignore[dict-item]
}


def split_files(name: str, data: Path, work: Path, known: dict[str, Any] = GLUE) -> dict[str, Any]:
    """Get the data section of a GLUE task, its rows split into three files of the work folder."""
    file, columns, tested, validated = known[name]
    with gzip.open(data / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = lines.readlines()
    random.Random(SPLIT_SEED).shuffle(rows)
    ends = {"test": (0, tested), "validation": (tested, tested + validated), "train": (tested + validated, None)}
    section: dict[str, Any] = dict(columns)
    for split, (start, end) in ends.items():
        section[split] = str(work / f"{name}-{split}.jsonl")
        Path(section[split]).write_text("".join(rows[start:end]), encoding="utf-8")
    return section | {"max_tokens": 96}


def tasks(asked: list[str], data: Path, work: Path) -> dict[str, Any]:
    """Get task -> what goes over the base run."""
    found: dict[str, Any] = {name: {"data": split_files(name, data, work)} for name in asked if name in GLUE}
    if "languages" in asked:
        files = {split: str(path) for split, path in write_languages(work).items()}
        found["languages"] = {"data": files | {"max_tokens": 48}}
    return found


def with_rows(task: dict[str, Any], rows: int, epochs: float) -> dict[str, Any]:
    """Get the task with its training rows, seen at least as often as 64 steps need."""
    epochs = max(epochs, FEWEST_STEPS / math.ceil(rows / BATCH))
    return {"data": task["data"] | {"limit": {"train": rows}}, "training": {"epochs": epochs}}


def each_size(found: dict[str, Any], sizes: list[int], epochs: float) -> dict[str, Any]:
    """Get every task at every number of rows; one number leaves the tasks' names as they are."""
    return {
        name if len(sizes) == 1 else f"{name}-{rows}": with_rows(task, rows, epochs)
        for name, task in found.items()
        for rows in sizes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("data_spectra"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["languages", *GLUE], choices=["languages", *GLUE])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rows", nargs="+", type=int, default=[2000], help="training rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    rows = ", ".join(f"{size:,}" for size in asked.rows)
    sweep = {
        "title": f"Cores in directions of the data against LoRA at equal trained numbers, MiniLM, {rows} rows",
        "run": {
            "recipe": "text_classification",
            "model": str(base_folder()),
            "pooling": "mean",
            "training": {"batch_size": BATCH, "head_first": True, "head_learning_rate": 1e-3},
        },
        "tasks": each_size(tasks(asked.tasks, asked.data, asked.work), asked.rows, asked.epochs),
        "methods": {name: {"adapter": ARMS[name][0], "learning_rates": ARMS[name][1]} for name in asked.arms},
        "baseline": next((name for name in ("lora", "limited_lora") if name in asked.arms), None),
        "seeds": asked.seeds,
        "tuning_seeds": 1,
        "keep": "nothing",
    }
    record_sweep(parse_sweep(sweep), asked.work / "sweep", asked.output, None, asked.jobs)


if __name__ == "__main__":
    main()

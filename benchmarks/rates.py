"""Learning rates: every method over a grid of half decades on three small tasks, and where the default stands.

    python benchmarks/rates.py --work FOLDER [--methods spectral_a ...] [--tasks languages digits german]

The grid of a method starts at its default times 1/10, 1/3, 1, 3, 10 and grows while the best rate is at an end of it.
A rate is scored by the validation examples of one seed; the tasks are those of `spectune reproduce --small`: a head and
an adapter on all-MiniLM-L6-v2 (24 languages), four new digits for a small vision transformer, German for a small
language model that has read Dutch. Every run leaves its figure in --work, and a second start goes on from there. Writes
benchmarks/results/rates.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusion_arms import cached
from provenance import provenance

from spectune.checkpoint import write_atomically
from spectune.methods import METHODS
from spectune.papers.small_models import MAKERS
from spectune.recipes import parse_config
from spectune.runs import run

RESULTS = Path(__file__).parent / "results" / "rates.json"
# Half decades: finer than a factor of three is within what seeds move.
LADDER = (1, 3)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
    "spectral_a": {"method": "spectral_a", "r": 8},
    "spectral_r": {"method": "spectral_r", "r": 8},
    "svft": {"method": "svft", "pattern": "banded", "off_diagonals": 2},
    "specadapt": {"method": "specadapt", "r": 8},
    "svdiff": {"method": "svdiff"},
    "lidb": {"method": "lidb"},
    "orthogonal_adaptation": {"method": "orthogonal_adaptation", "r": 8},
}
TASKS: dict[str, dict[str, Any]] = {
    "languages": {
        "maker": "languages",
        "targets": ["query", "key", "value"],
        "metric": "accuracy",
        "run": {
            "recipe": "text_classification",
            "model": "minilm",
            "pooling": "mean",
            "dropout": 0.0,
            "data": {
                "train": "languages_train",
                "validation": "languages_validation",
                "limit": {"train": 2000, "validation": 500},
                "max_tokens": 24,
            },
            "training": {"steps": 60, "batch_size": 16, "head_learning_rate": 3e-2},
        },
    },
    "digits": {
        "maker": "digits",
        "targets": "all-linear",
        "metric": "accuracy",
        "run": {
            "recipe": "image_classification",
            "model": "vit",
            "data": {"train": "new_digits", "augment": False},
            "training": {"steps": 100, "batch_size": 20, "warmup": 0.1, "head_learning_rate": 4e-3},
        },
    },
    "german": {
        "maker": "interface_lm",
        "targets": "all-linear",
        "metric": "loss",
        "run": {
            "recipe": "causal_lm",
            "model": "lm",
            "data": {
                "format": "text",
                "loss_on": "all",
                "max_tokens": 48,
                "train": "german_train",
                "validation": "german_validation",
            },
            "training": {"steps": 100, "batch_size": 16},
        },
    },
}


def rung(place: int) -> float:
    """Get a rate of the half-decade ladder: place 0 is 1, 1 is 3, 2 is 10, -1 is 0.3."""
    decade, half = divmod(place, 2)
    return float(f"{LADDER[half]}e{decade}")


def nearest_rung(rate: float) -> int:
    return round(2 * math.log10(rate))


def default_of(method: str) -> float:
    # 2e-4: what PEFT's own examples give a LoRA.
    return 2e-4 if method == "lora" else METHODS[method].learning_rate


def filled(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner, words) for key, inner in value.items()}
    return words.get(value, value) if isinstance(value, str) else value


def score(work: Path, task: str, method: str, rate: float, words: dict[str, str]) -> dict[str, Any]:
    """Get the validation figure of one run; a run that diverged has none."""
    asked = filled(TASKS[task]["run"], words)
    asked["training"] |= {"learning_rate": rate, "save_every": 10_000}
    asked["adapter"] = {**ADAPTERS[method], "target_modules": TASKS[task]["targets"]}
    folder = work / "runs" / f"{task}-{method}-{rate:g}"
    shutil.rmtree(folder, ignore_errors=True)
    found = run(parse_config(asked), folder)
    shutil.rmtree(folder)
    value = found.metrics["validation"][TASKS[task]["metric"]]
    finite = math.isfinite(value) and all(map(math.isfinite, found.losses))
    return {"value": value if finite else None, "trained": found.trainable, "step_seconds": found.step_seconds}


def better(task: str, value: float | None) -> float:
    """Get a number of which more is better."""
    if value is None:
        return -math.inf
    return -value if TASKS[task]["metric"] == "loss" else value


def curve(task: str, method: str, at: Callable[[float], dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """Get rate -> figures over a grid that has its best rate inside."""
    middle = nearest_rung(default_of(method))
    found = {place: at(rung(place)) for place in range(middle - 2, middle + 3)}
    while True:
        best = max(found, key=lambda place: (better(task, found[place]["value"]), -place))
        further = best - 1 if best == min(found) else best + 1 if best == max(found) else None
        if further is None:
            return {rung(place): found[place] for place in sorted(found)}
        found[further] = at(rung(further))


def compromise(curves: list[tuple[str, dict[str, float | None]]]) -> float:
    """Get the rate whose worst shortfall over the tasks is least; (task, curve) of one method.

    The shortfall is the way from the best figure of the curve, as a share of the way from best to worst.
    """
    worst: dict[float, float] = {}
    for rate in set.intersection(*({float(tried) for tried in curve} for _, curve in curves)):
        shares = []
        for task, curve in curves:
            values = {float(tried): better(task, value) for tried, value in curve.items()}
            best, least = max(values.values()), min(v for v in values.values() if math.isfinite(v))
            shares.append((best - values[rate]) / ((best - least) or 1.0))
        worst[rate] = max(shares)
    return min(worst, key=lambda rate: (worst[rate], rate))


def measure(work: Path, tasks: list[str], methods: list[str]) -> dict[str, Any]:
    """Get task -> method -> curve, best rate and where the default stands."""
    table: dict[str, Any] = {}
    for task in tasks:
        made = work / "made"
        made.mkdir(parents=True, exist_ok=True)
        words = MAKERS[TASKS[task]["maker"]](made)
        table[task] = {"metric": TASKS[task]["metric"], "steps": TASKS[task]["run"]["training"]["steps"], "methods": {}}
        for method in methods:

            def at(rate: float, task: str = task, method: str = method, words: dict[str, str] = words) -> Any:
                path = work / f"{task}-{method}-{rate:g}"
                return cached(path, lambda: score(work, task, method, rate, words))

            found = curve(task, method, at)
            best = max(found, key=lambda rate: (better(task, found[rate]["value"]), -rate))
            table[task]["methods"][method] = {
                "best": best,
                "value": found[best]["value"],
                "trained": found[best]["trained"],
                "curve": {f"{rate:g}": run["value"] for rate, run in found.items()},
            }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    tasks = measure(told.work.resolve(), told.tasks, told.methods)
    record = {
        "tasks": tasks,
        "compromise": {
            method: compromise([(name, task["methods"][method]["curve"]) for name, task in tasks.items()])
            for method in told.methods
        },
        "adapters": {method: ADAPTERS[method] for method in told.methods},
        "defaults": {method: default_of(method) for method in told.methods},
        **provenance(),
    }
    write_atomically(told.results, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Adapters trained for company: `prepare(away_from=…)` keeps each out of the others' inputs; then they are summed.

    python benchmarks/company.py --data FOLDER --work FOLDER [--seeds 0 1 2] [--tasks …] [--rows 1000] [--epochs 1]

A dense core in the gradient's directions on the attention's four weights of all-MiniLM-L6-v2, each task with its own
head. Every arm is scored alone and in the sum of all its adapters; "of plain" is the sum's share of what the plain core
scores alone. Rows as in merging.py, fewer of them. Goes on when started again. Writes
benchmarks/results/company.json (--output).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusion_arms import cached
from merging import RESULTS, TARGETS, Bench, score
from provenance import provenance

from spectune import SpectralConfig, prepare
from spectune.checkpoint import write_atomically
from spectune.demo import base_folder
from spectune.fusion import fuse
from spectune.runs import examples_of, load_run, load_with, run
from spectune.runs.drawn_examples import batches_of

TASKS = ("sst2", "cola", "languages")
BASIS = 78  # as many numbers as LoRA of rank 8 in a weight of 384 x 384
RATE = 3e-3  # of .24 / P, the default for dense cores (docs/data-spectra.md)
EXAMPLES, A_BATCH = 256, 16  # as a run passes them
ARMS = {"plain": None, "away, .9": 0.9, "away, half": 0.5}


@dataclass(frozen=True)
class Company(Bench):
    """Runs whose adapters know of each other."""

    def fitted_head(self, task: str, seed: int) -> Path:
        """Get the folder of the run that fits a head on the untouched body."""
        config, folder = self.head(task, seed)
        run(config, folder, resume=True)
        return folder

    def core(self, task: str, seed: int, share: float | None) -> Path:
        """Get the run of a core whose directions keep out of a share of the others' inputs."""
        place = self.work / f"{task}-{'plain' if share is None else share}-{seed}"
        core = {"method": "svft", "pattern": "dense", "basis_rank": BASIS, "target_modules": TARGETS}
        core |= {"directions": "gradient"}
        if not list(place.glob("basis-*")):
            recipe, model = load_run(self.fitted_head(task, seed))
            heads = [self.fitted_head(other, seed) for other in self.tasks if other != task]
            others = [batch for head in heads for batch in examples_of(head)]
            away: dict[str, Any] = {} if share is None else {"away_from": others, "away_share": share}
            batches = batches_of(recipe, EXAMPLES, A_BATCH)
            prepare(model, SpectralConfig(**core), batches, loss=recipe.loss, save=place, **away)
        (basis,) = place.glob("basis-*")  # where a run below finds it again
        training = {"epochs": self.epochs, "learning_rate": RATE, "head_learning_rate": 1e-3}
        folder = place / "run"
        run(self.config(task, seed, core | {"basis": str(basis)}, training), folder, resume=True)
        return folder


def measured(bench: Company, seed: int, share: float | None) -> dict[str, Any]:
    """Get task -> what it scores alone, and in the sum of all."""
    folders = {task: bench.core(task, seed, share) for task in bench.tasks}
    alone = {task: score(tested(folder)) for task, folder in folders.items()}
    together = bench.work / f"sum-{'plain' if share is None else share}-{seed}"
    fuse(list(folders.values()), rule="average", weights=1.0, base=base_folder(), heads_apart=True).save(
        together, overwrite=True
    )
    merged = {}
    for task, folder in folders.items():
        recipe, model = load_with(folder, together)
        merged[task] = score(recipe.evaluate(model, "test"))
    return {"alone": alone, "merged": merged}


def tested(folder: Path) -> dict[str, float]:
    recipe, model = load_run(folder)
    found: dict[str, float] = recipe.evaluate(model, "test")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS.with_name("company.json"))
    asked = parser.parse_args()
    bench = Company(asked.data, asked.work, asked.epochs, tuple(asked.tasks), asked.rows)
    found: list[dict[str, Any]] = []
    for seed in asked.seeds:
        arms = {}
        for name, share in ARMS.items():
            arms[name] = cached(asked.work / f"{name}-{seed}.json", partial(measured, bench, seed, share))
            plain = arms["plain"]["alone"]
            for task, figures in arms[name]["merged"].items():
                alone = arms[name]["alone"][task]
                share_of = figures / plain[task]
                print(f"{seed} {name:10} {task:10} alone {alone:.3f}, merged {figures:.3f}: {share_of:.3f} of plain")
        found.append({"seed": seed, "arms": arms})
        record = {**provenance(), "tasks": asked.tasks, "rows": asked.rows, "epochs": asked.epochs, "seeds": found}
        write_atomically(asked.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

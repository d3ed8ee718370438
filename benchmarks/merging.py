"""Five tasks on one sentence encoder, trained apart and merged into one body, each with its own head: what is kept.

    python benchmarks/merging.py --data FOLDER --work FOLDER [--seeds 0 1 2] [--tasks …]

SST-2, CoLA, MRPC, STS-B (each .jsonl.gz in FOLDER with GLUE's columns) and the demo's 24 languages; 2,000 training rows
each, two epochs, a LoRA of rank 8 on the attention's four weights of all-MiniLM-L6-v2, at the rate that was the best
of three for LoRA on the languages (benchmarks/results/demo.json). Rules that look at examples get training rows,
without labels. The score is accuracy (Spearman's correlation for STS-B); what counts is its share of the adapter's own.
"refitted head" is the untouched body with a head fitted on the training rows: what a merge has to beat; "trained on all
tasks" is one LoRA of rank 8 on all rows at once, which needs them in one place. Goes on when started again. Writes
benchmarks/results/merging.json after each seed, and keeps the rows of other seeds that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_spectra import GLUE, split_files
from fusion_arms import cached, refuse_other_settings, spread
from multitask import trained_together
from peft import LoraConfig, PeftModel
from provenance import provenance

from spectune.checkpoint import write_atomically
from spectune.demo import base_folder, write_languages
from spectune.fusion import FUSIONS, collect_grams, fuse
from spectune.recipes import parse_config
from spectune.runs import examples_of, load_run, load_with, run, tuned_weights

RESULTS = Path(__file__).parent / "results" / "merging.json"
TARGETS = ["query", "key", "value", "attention.output.dense"]
RATE = 2e-3
HEAD_RATE = 1e-3
TOGETHER = "trained on all tasks, rank 8"
TASKS = ("sst2", "cola", "mrpc", "stsb", "languages")
STSB = {"stsb": ("stsb_train", {"glue": "stsb"}, 1200, 400)}
LIMIT = {"train": 2000, "validation": 400, "test": 1000}


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    data: Path
    work: Path
    epochs: float
    tasks: tuple[str, ...] = TASKS
    rows: int = LIMIT["train"]

    def config(self, task: str, seed: int, adapter: Any, training: dict[str, Any]) -> Any:
        """Get the configuration of one run."""
        files = self.work / "data"
        files.mkdir(exist_ok=True)
        if task == "languages":
            data: dict[str, Any] = {split: str(path) for split, path in write_languages(files).items()}
            data |= {"max_tokens": 48}
        else:
            data = split_files(task, self.data, files, GLUE | STSB)
        values = {
            "recipe": "text_classification",
            "model": str(base_folder()),
            "pooling": "mean",
            "seed": seed,
            "data": data | {"limit": LIMIT | {"train": self.rows}},
            "adapter": adapter,
            "training": {"batch_size": 32, "head_first": True, **training},
            "evaluation": {"metrics": ["spearman" if task == "stsb" else "accuracy"]},
        }
        return parse_config(values, task)

    def folder(self, task: str, seed: int) -> Path:
        return self.work / f"{task}-{seed}"

    def place(self, name: str, seed: int) -> Path:
        """Get the path for what is made of these tasks together."""
        return self.work / "-".join([*self.tasks, f"{name}-{seed}"])

    def adapter(self, task: str, seed: int) -> tuple[Any, Path]:
        """Get the run that trains an adapter."""
        lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": TARGETS}
        training = {"epochs": self.epochs, "learning_rate": RATE, "head_learning_rate": HEAD_RATE}
        return self.config(task, seed, lora, training), self.folder(task, seed)

    def head(self, task: str, seed: int) -> tuple[Any, Path]:
        """Get the run that fits a head on the untouched body."""
        # One step too small to change anything: a run has at least one.
        tiny = {"steps": 1, "head_learning_rate": 1e-12}
        return self.config(task, seed, "head", tiny), self.work / f"{task}-head-{seed}"


def score(figures: dict[str, float]) -> float:
    """Get the one figure of a task."""
    return next(iter(figures.values()))


@dataclass(frozen=True)
class Arm:
    """One way to merge: a rule with its options, or a weighted merge of PEFT."""

    rule: str
    options: dict[str, Any]
    label: str = ""
    rounds: int | None = None
    """Merges that are tried for weights that suit the validation examples."""
    examples: int = 256
    """Of each task, for the rules that look at some."""

    @property
    def name(self) -> str:
        return self.label or self.rule


ARMS = (
    Arm("average", {}),
    Arm("average", {"weights": 1.0}, "sum"),
    Arm("ties", {"density": 0.2}, "PEFT ties"),
    Arm("svd", {"svd_rank": 8}, "PEFT svd, rank 8"),
    Arm("task_singular", {}),
    Arm("isotropic", {}),
    Arm("isotropic", {"common": 0.8}, "isotropic, common .8"),
    Arm("core", {}),
    Arm("aligned_ties", {}),
    Arm("calibrated", {}),
    Arm("gradient", {}),
    Arm("sequential", {}),
    Arm("match", {}),
    Arm("match", {"rank": 8}, "match, rank 8"),
    Arm("match", {}, "match, 64 examples", examples=64),
    Arm("match", {}, "match, 16 examples", examples=16),
    Arm("match", {}, "match, weights tuned", rounds=4),
    Arm("match", {"rank": 8}, "match, rank 8, weights tuned", rounds=4),
)


def merged(arm: Arm, bench: Bench, seed: int) -> dict[str, Any]:
    """Merge the adapters of one seed and get what each task scores with its own head."""
    folders, output = [bench.folder(task, seed) for task in bench.tasks], bench.place(f"merged-{arm.name}", seed)
    started = time.perf_counter()
    if arm.name.startswith("PEFT"):
        rank = merge_by_peft(arm, bench, seed, output)
    else:
        told = {**arm.options, **looked(arm, folders)}
        merge = partial(fuse, folders, rule=arm.rule, base=base_folder(), heads_apart=True, **told)
        if arm.rounds is None:
            fused = merge()
        else:
            fused, _ = tuned_weights(folders, lambda weights: merge(weights=weights), arm.rounds, print)
        rank = fused.save(output, overwrite=True).max_rank
    seconds = time.perf_counter() - started
    return {"rank": rank, "seconds": seconds, "scores": tested(bench, folders, output)}


def looked(arm: Arm, folders: Sequence[Path]) -> dict[str, Any]:
    """Get the examples for the rules that look at some."""
    if arm.rule == "gradient":
        return {
            "activations": [collect_grams(load_run(folder)[1], examples_of(folder, arm.examples)) for folder in folders]
        }
    if not FUSIONS[arm.rule].behind:
        return {}
    return {
        "model": load_with(folders[0], None)[1],
        "examples": [examples_of(folder, arm.examples) for folder in folders],
    }


def tested(bench: Bench, folders: Sequence[Path], adapter: Path | None) -> dict[str, float]:
    """Get the test score of each task with this adapter on the body."""
    found = {}
    for task, folder in zip(bench.tasks, folders, strict=True):
        recipe, model = load_with(folder, adapter)
        found[task] = score(recipe.evaluate(model, "test"))
    return found


def multitask(bench: Bench, seed: int) -> dict[str, Any]:
    """Train one adapter on all tasks at once, each with its own head, and get what each scores."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    heads = [bench.head(task, seed)[1] for task in bench.tasks]
    tasks = trained_together(heads, lora, RATE, HEAD_RATE, int(bench.epochs))
    scores = {
        name: score(recipe.evaluate(model, "test")) for name, (recipe, model) in zip(bench.tasks, tasks, strict=True)
    }
    return {"rank": 8, "seconds": time.perf_counter() - started, "scores": scores}


def merge_by_peft(arm: Arm, bench: Bench, seed: int, output: Path) -> int:
    """Let PEFT's `add_weighted_adapter` merge the adapters, their heads left out; get the rank of the result."""
    model: Any = load_with(bench.folder(bench.tasks[0], seed), None)[1]
    for task in bench.tasks:
        bare = bench.work / f"bare-{task}-{seed}"
        fuse([bench.folder(task, seed)], rule="average", weights=1.0, heads_apart=True).save(bare, overwrite=True)
        if task == bench.tasks[0]:
            model = PeftModel.from_pretrained(model, str(bare), adapter_name=task)
        else:
            model.load_adapter(str(bare), adapter_name=task)
    weights = [1.0 if arm.rule == "ties" else 1 / len(bench.tasks)] * len(bench.tasks)
    model.add_weighted_adapter(list(bench.tasks), weights, "merged", combination_type=arm.rule, **arm.options)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(str(bench.work / "peft"), selected_adapters=["merged"])
    (bench.work / "peft" / "merged").rename(output)
    return int(model.peft_config["merged"].r)


def measure(bench: Bench, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Get one row for each seed, running what has not been run."""
    for seed in seeds:
        own = {task: score(run(*bench.adapter(task, seed), resume=True).metrics["test"]) for task in bench.tasks}
        heads = {task: score(run(*bench.head(task, seed), resume=True).metrics["test"]) for task in bench.tasks}
        arms = {"refitted head": {"rank": 0, "seconds": 0.0, "scores": heads}}
        arms[TOGETHER] = cached(bench.place("multitask", seed), partial(multitask, bench, seed))
        for arm in ARMS:
            arms[arm.name] = cached(bench.place(arm.name, seed), partial(merged, arm, bench, seed))
        yield {"seed": seed, "own": own, "arms": arms, **provenance()}


def kept_rows(path: Path, bench: Bench, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Get the rows of other seeds from an earlier record of the same settings."""
    if not path.exists():
        return []
    record = json.loads(path.read_text("utf-8"))
    if (record["epochs"], record["rate"]) != (bench.epochs, RATE):
        return []
    by = {key: record[key] for key in provenance()}
    same = [row for row in record["rows"] if tuple(row["own"]) == bench.tasks and row["seed"] not in seeds]
    return [{**by, **row} for row in same]


def shares(row: dict[str, Any], arm: str) -> list[float]:
    """Get what each task keeps of its adapter's own score."""
    return [after / row["own"][task] for task, after in row["arms"][arm]["scores"].items()]


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Get arm -> mean and lowest share, over tasks and seeds."""
    found = {}
    for arm in rows[0]["arms"]:
        kept = [shares(row, arm) for row in rows]
        means = [statistics.mean(one) for one in kept]
        found[arm] = {
            "mean": spread(means),
            "worst": spread([min(one) for one in kept]),
            "rank": max(row["arms"][arm]["rank"] for row in rows),
            "seconds": statistics.median(row["arms"][arm]["seconds"] for row in rows),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(asked.work, {"epochs": asked.epochs})
    bench = Bench(asked.data, asked.work, asked.epochs, tuple(asked.tasks))
    rows = kept_rows(asked.results, bench, asked.seeds)
    for row in measure(bench, asked.seeds):
        rows = sorted([*rows, row], key=lambda row: int(row["seed"]))
        record = {
            "what": "tasks trained apart and merged into one body",
            **provenance(),
            "epochs": asked.epochs,
            "rate": RATE,
            "kept": table(rows),
            "rows": rows,
        }
        write_atomically(asked.results, json.dumps(record, indent=1) + "\n")
    for arm, figures in record["kept"].items():
        print(f"{arm:20} mean {figures['mean']['mean']:.1%} worst {figures['worst']['mean']:.1%}")


if __name__ == "__main__":
    main()

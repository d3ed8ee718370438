"""Three language tasks on one sentence encoder, trained apart and fused into one body: accuracy kept by each task.

    python benchmarks/fusion_text.py --work FOLDER [--seeds 0 1 2]

The tasks are the demo's sentences split by family: tell the Germanic, the Romance, the other languages apart. Each is
trained on all-MiniLM-L6-v2 with its own head and, of equal size, `spectral_a` (disjoint blocks of columns), LoRA or
`orthogonal_adaptation`; then the three bodies' updates are fused, and every task is tested with the head that it had.
The rate of each method is the best of as many tries, by the validation accuracy of one unfused task on a seed that is
not used again. Every run leaves one JSON in --work, and a second start goes on from there. Writes the part "text" of
benchmarks/results/fusion.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_arms import (
    ARMS,
    METHODS,
    RESULTS,
    Arm,
    best_rate,
    cached,
    fuse_arm,
    options_of,
    record_part,
    refuse_other_settings,
    row_of,
    without_adapter,
)
from mean_pooled import Setting, TextClassification, accuracy, fit, sentence_loss
from safetensors.torch import load_file, save_file

from spectune.demo.demo import base_folder
from spectune.demo.languages import LANGUAGES, LanguageTask, Sentences, load_languages
from spectune.fusion import collect_grams
from spectune.tuner import attach, build_adapter_config, load_attached

TASKS = {
    "Germanic": ("af", "nl", "de", "da", "nb", "nn", "sv", "is"),
    "Romance": ("es", "ca", "gl", "pt", "it", "ro", "fr"),
    "other": ("cs", "sk", "pl", "sl", "sr_Latn", "fi", "et", "id", "ms"),
}
# 384 x 384 weights only: there 16 output columns of orthogonal_adaptation are as many numbers as r = 8 of the others.
TARGETS = ["query", "key", "value", "attention.output.dense"]
ORTHOGONAL = {"r": 16}
GRIDS = {
    "spectral_a": [5e-4, 1.2e-3, 3e-3],
    "lora": [2e-3, 5e-3, 1.2e-2],
    "orthogonal_adaptation": [1e-3, 3e-3, 1e-2],
}
# The seed of the choice of rates; the measured seeds start at 0.
TRY, TRIED = 100, "Romance"
GRAM_TEXTS = 256


def task_of(whole: LanguageTask, name: str) -> LanguageTask:
    """Get the part of the sentences in the languages of one task."""
    places = [list(LANGUAGES).index(code) for code in TASKS[name]]

    def own(part: Sentences) -> Sentences:
        rows = [(text, places.index(t)) for text, t in zip(part.texts, part.targets, strict=True) if t in places]
        return Sentences(tuple(text for text, _ in rows), tuple(target for _, target in rows))

    labels = tuple(whole.labels[place] for place in places)
    return LanguageTask(labels, own(whole.train), own(whole.validation), own(whole.test))


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    tasks: dict[str, LanguageTask]
    work: Path
    steps: int
    batch_size: int
    tested: int

    def folder(self, method: str, rate: float, task: str, seed: int) -> Path:
        return self.work / f"{method}-{rate:g}-{task}-{seed}"

    def recipe(self, task: str, seed: int) -> TextClassification:
        labels = self.tasks[task].labels
        return TextClassification(Setting(base_folder(), labels, self.steps, seed, self.batch_size, max_tokens=16))

    def train(self, method: str, rate: float, task: str, seed: int) -> dict[str, Any]:
        """Train one task and get its accuracy before fusion. The head stands in a file of its own: no rule fuses it."""
        folder, recipe, train = self.folder(method, rate, task, seed), self.recipe(task, seed), self.tasks[task].train
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
        started = time.perf_counter()
        model: Any = attach(
            recipe.fresh_model(), build_adapter_config(options_of(method, list(TASKS).index(task), TARGETS, ORTHOGONAL))
        )
        adapter = [p for p in model.parameters() if p.requires_grad]
        head = model.get_base_model().classifier.requires_grad_(True)
        rows = [{**row, "labels": t} for row, t in zip(recipe.tokens(train.texts), train.targets, strict=True)]
        fit(
            model,
            rows,
            recipe.collate,
            sentence_loss,
            steps=self.steps,
            batch_size=self.batch_size,
            rates=[([*head.parameters()], recipe.setting.head_rate), (adapter, rate)],
            seed=seed,
        )
        seconds = time.perf_counter() - started
        model.eval().save_pretrained(str(folder / "adapter"))
        save_file(head.state_dict(), folder / "head.safetensors")
        found = {"train_seconds": seconds, "trained": sum(p.numel() for p in adapter)}
        return found | {
            part: self.test(folder / "adapter", folder, task, seed, part) for part in ("validation", "test")
        }

    def model(self, adapter: Path | None, head: Path, task: str, seed: int) -> Any:
        model: Any = self.recipe(task, seed).fresh_model()
        model.classifier.load_state_dict(load_file(head / "head.safetensors"))
        return (model if adapter is None else load_attached(model, adapter)).eval()

    def test(self, adapter: Path | None, head: Path, task: str, seed: int, part: str = "test") -> float:
        """Get the accuracy of a body with this adapter and a task's own head."""
        recipe, sentences = self.recipe(task, seed), getattr(self.tasks[task], part).first(self.tested)
        return accuracy(recipe.predict(self.model(adapter, head, task, seed), sentences.texts), sentences.targets)

    def fuse(self, arm: Arm, folders: Sequence[Path], seed: int) -> dict[str, Any]:
        """Fuse the bodies of one seed and get the accuracy of every task."""
        started, grams = time.perf_counter(), None
        if arm.rule == "gradient":
            grams = [self.grams(folder, task, seed) for folder, task in zip(folders, TASKS, strict=True)]
        gram_seconds = time.perf_counter() - started
        output = self.work / f"fused-{seed}-{ARMS.index(arm)}"
        cost = fuse_arm(arm, [folder / "adapter" for folder in folders], base_folder(), grams, output)
        tests = {
            task: {"accuracy": self.test(output, folder, task, seed)}
            for folder, task in zip(folders, TASKS, strict=True)
        }
        return cost | {"gram_seconds": gram_seconds, "scores": tests}

    def bare(self, folders: Sequence[Path], seed: int) -> dict[str, Any]:
        """Get the accuracy of the heads on the untouched body."""
        pairs = zip(folders, TASKS, strict=True)
        return {"scores": {task: {"accuracy": self.test(None, folder, task, seed)} for folder, task in pairs}}

    def grams(self, folder: Path, task: str, seed: int) -> dict[str, torch.Tensor]:
        """Get the Gram matrices of what training sentences of a task send into the adapted layers."""
        recipe = self.recipe(task, seed)
        rows = recipe.tokens(self.tasks[task].train.first(GRAM_TEXTS).texts)
        batches = [recipe.collate(rows[start : start + 32]) for start in range(0, len(rows), 32)]
        return collect_grams(self.model(folder / "adapter", folder, task, seed), batches)


def measure(bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """Get rates and rows, running what has not been run."""
    tries: dict[str, dict[str, float]] = {}
    rates: dict[str, float] = {}
    for method, grid in GRIDS.items():
        found = {
            rate: cached(bench.folder(method, rate, TRIED, TRY), partial(bench.train, method, rate, TRIED, TRY))
            for rate in grid
        }
        rates[method] = best_rate({rate: run["validation"] for rate, run in found.items()})
        tries[method] = {f"{rate:g}": run["validation"] for rate, run in found.items()}
    before: dict[str, list[Any]] = {method: [] for method in METHODS}
    bare: dict[str, list[Any]] = {method: [] for method in METHODS}
    after: dict[Arm, list[Any]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        folders = {m: [bench.folder(m, rates[m], task, seed) for task in TASKS] for m in METHODS}
        for method in METHODS:
            runs = {
                task: cached(folder, partial(bench.train, method, rates[method], task, seed))
                for folder, task in zip(folders[method], TASKS, strict=True)
            }
            before[method].append(runs)
            path = bench.work / f"bare-{method}-{seed}"
            bare[method].append(cached(path, partial(bench.bare, folders[method], seed)))
        for arm in ARMS:
            path = bench.work / f"fused-{seed}-{ARMS.index(arm)}"
            after[arm].append(cached(path, partial(bench.fuse, arm, folders[arm.method], seed)))
    methods = {
        method: {
            "trained": runs[0][TRIED]["trained"],
            "train_seconds": statistics.median(run["train_seconds"] for row in runs for run in row.values()),
            "without adapter": without_adapter(bare[method]),
        }
        for method, runs in before.items()
    }
    rows = [
        row_of(arm, [{t: {"accuracy": run["test"]} for t, run in row.items()} for row in before[arm.method]], runs)
        for arm, runs in after.items()
    ]
    return {"tries": tries, "rates": rates, "seeds": len(seeds), "methods": methods, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tested", type=int, default=500, help="sentences of each part that are judged")
    parser.add_argument("--results", type=Path, default=RESULTS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    told.work.mkdir(parents=True, exist_ok=True)
    sizes = {"steps": told.steps, "batch_size": told.batch_size, "tested": told.tested}
    refuse_other_settings(told.work, sizes)
    whole = load_languages()
    bench = Bench({name: task_of(whole, name) for name in TASKS}, told.work, told.steps, told.batch_size, told.tested)
    record_part("text", {**sizes, **measure(bench, told.seeds)}, told.results)


if __name__ == "__main__":
    main()

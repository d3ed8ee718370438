"""Three concepts of the glyph model, trained apart and fused by every rule: what is kept of each, and what it takes.

    python benchmarks/fusion.py --work FOLDER [--base FOLDER] [--judge FILE] [--seeds 0 1 2]

Every concept is trained from one base with `spectral_a` (disjoint blocks of columns), LoRA and `orthogonal_adaptation`
of equal size on attention and convolutions, and with a word of its own. The rate of each method is the best of as many
tries, by the identity of one unfused concept with training and sampling seeds that are not used again. A classifier
says in how many pictures a concept is recognised, alone and beside another glyph, before and after fusion. Every run
leaves one JSON in --work, and a second start goes on from there. Writes the part "glyphs" of
benchmarks/results/fusion.json; benchmarks/fusion_text.py writes the part "text".
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
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
    spread,
    without_adapter,
)
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.glyphs.base import train_base
from examples.glyphs.concepts import BESIDE, write_concept
from examples.glyphs.judge import Judge, correct, identity, train_classifier
from examples.glyphs.outlines import CONCEPTS
from examples.glyphs.scenes import PLACES, random_prompt
from examples.glyphs.train_base import GUIDANCE
from examples.glyphs.train_concept import run_of
from spectune.concepts.config import Drawings
from spectune.concepts.drawings import calls_while_drawing
from spectune.concepts.pipeline import load_concepts, open_pipeline, sample
from spectune.concepts.text_to_image import ATTENTION
from spectune.fusion import collect_grams
from spectune.runs import run

TARGETS = [*ATTENTION, "conv1", "conv2"]
# O r numbers and not (O + I) r: with these it trains 110,976 numbers and the others 110,848. Three blocks of rows fit.
ORTHOGONAL = {"r": 16, "rank_pattern": {"conv1": 94, "conv2": 94}}
GRIDS = {
    "spectral_a": [4e-3, 8e-3, 1.6e-2, 3.2e-2],
    "lora": [2e-3, 4e-3, 8e-3, 1.6e-2],
    "orthogonal_adaptation": [1e-3, 2e-3, 4e-3, 8e-3],
}
# Training and sampling seed of the choice of rates; the measured seeds start at 0.
TRY = 100
# Of the three the one whose spectral columns are neither the strongest nor the weakest.
TRIED = "<wug>"
SAMPLING_STEPS = 10
DRAWN = Drawings.model_validate({"steps": SAMPLING_STEPS, "guidance": GUIDANCE})


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    base: Path
    judge: Judge
    work: Path
    steps: int
    batch_size: int
    pictures: int
    """Judged pictures of each kind."""

    def folder(self, method: str, rate: float, concept: str, seed: int) -> Path:
        return self.work / f"{method}-{rate:g}-{concept.strip('<>')}-{seed}"

    def train(self, method: str, rate: float, concept: str, seed: int) -> dict[str, Any]:
        """Train one concept and get its figures before fusion."""
        folder = self.folder(method, rate, concept, seed)
        for stale in (folder, folder.with_name(folder.name + "-pictures")):
            shutil.rmtree(stale, ignore_errors=True)  # of a run that was broken off
        config = run_of(
            self.base,
            write_concept(concept, folder.with_name(folder.name + "-pictures")),
            concept,
            adapter={"unet": options_of(method, list(CONCEPTS).index(concept), TARGETS, ORTHOGONAL)},
            training={"learning_rate": rate, "steps": self.steps, "batch_size": self.batch_size},
            seed=seed,
            prior={"images": 32},
            drawings={"prompts": [], "steps": SAMPLING_STEPS},
        )
        started = time.perf_counter()
        result = run(config, folder)
        done = {"train_seconds": time.perf_counter() - started, "trained": result.trainable}
        return done | self.look([folder], [concept], seed)

    def look(self, folders: Sequence[Path], concepts: Sequence[str], seed: int) -> dict[str, Any]:
        """Get in what share of pictures each concept is recognised, and how many of the base's prompts come out right.

        The noise does not depend on what is loaded, so before and after fusion are the same draws.
        """
        pipeline, scores = load_concepts(open_pipeline(self.base), folders), {}
        for concept in concepts:
            places = [list(PLACES)[i % len(PLACES)] for i in range(self.pictures)]
            alone = self.draw(pipeline, [f"a {concept} {place}" for place in places], seed)
            pairs = self.draw(pipeline, [f"a {concept} on the left and {BESIDE}"] * self.pictures, seed)
            found = [identity(self.judge, [image], concept, place) for image, place in zip(alone, places, strict=True)]
            company = identity(self.judge, pairs, concept, "on the left")
            scores[concept] = {"alone": sum(found) / self.pictures, "in company": company}
        prompts = base_prompts(self.pictures)
        right = correct(self.judge, self.draw(pipeline, prompts, seed), prompts)
        return {"scores": scores, "base prompts": sum(right) / len(prompts)}

    def draw(self, pipeline: Any, prompts: Sequence[str], seed: int) -> list[Any]:
        return sample(pipeline, prompts, seed=first_noise(seed), steps=SAMPLING_STEPS, guidance=GUIDANCE, batch_size=50)

    def fuse(self, arm: Arm, folders: Sequence[Path], seed: int) -> dict[str, Any]:
        """Fuse the concepts of one seed and get their figures."""
        started, grams = time.perf_counter(), None
        if arm.rule == "gradient":
            grams = [self.grams(folder, concept, seed) for folder, concept in zip(folders, CONCEPTS, strict=True)]
        gram_seconds = time.perf_counter() - started
        whole = self.work / f"fused-{seed}-{ARMS.index(arm)}"
        cost = fuse_arm(
            arm, [folder / "adapter" / "unet" for folder in folders], self.base / "unet", grams, whole / "unet"
        )
        words = [word_of(folder) for folder in folders]
        return cost | {"gram_seconds": gram_seconds} | self.look([whole, *words], list(CONCEPTS), seed)

    def bare(self, folders: Sequence[Path], seed: int) -> dict[str, Any]:
        """Get the figures of the words alone."""
        return self.look([word_of(folder) for folder in folders], list(CONCEPTS), seed)

    def grams(self, folder: Path, concept: str, seed: int) -> dict[str, torch.Tensor]:
        """Get the Gram matrices of what a concept's own prompts send into the UNet's adapted layers."""
        unet, calls = self.calls([folder], own_prompts(concept), seed)
        adapted = {
            name for name, _ in unet.named_modules() if name.split(".")[-1] in TARGETS or name.endswith("to_out.0")
        }
        return collect_grams(unet, calls, layers=sorted(adapted))

    def calls(self, folders: Sequence[Path], prompts: Sequence[str], seed: int) -> tuple[Any, list[dict[str, Any]]]:
        """Get the UNet and what it is called with while these concepts draw their prompts."""
        pipeline = load_concepts(open_pipeline(self.base), folders)
        return pipeline.unet, calls_while_drawing(pipeline, prompts, DRAWN, first_noise(seed + 50))


def first_noise(seed: int) -> int:
    """Get the first of a block of noise that no other seed, no training and no choice of rates has used."""
    return 10_000 * (seed + 1)


def own_prompts(concept: str) -> list[str]:
    return [f"a {concept} {place}" for place in PLACES] + [f"a {concept} on the left and {BESIDE}"]


def word_of(folder: Path) -> Path:
    """Get a folder with nothing but the concept's word: its adapter went into the fused one."""
    word = folder.with_name(folder.name + "-word")
    word.mkdir(exist_ok=True)
    shutil.copy(folder / "adapter" / "token.safetensors", word)
    return word


def base_prompts(count: int, seed: int = 2) -> list[str]:
    chance = random.Random(seed)
    return [random_prompt(chance) for _ in range(count)]


def load_judge(file: Path | None, work: Path) -> Judge:
    """Get the judge of a safetensors file, or train one and leave it in --work."""
    file = work / "judge.safetensors" if file is None else file
    if not file.exists():
        save_file(train_classifier().state_dict(), file)
    judge = Judge()
    judge.load_state_dict(load_file(file))
    return judge.eval()


def measure(bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """Get rates and rows, running what has not been run."""
    tries, rates = {}, {}
    for method, grid in GRIDS.items():
        found = {
            rate: cached(bench.folder(method, rate, TRIED, TRY), partial(bench.train, method, rate, TRIED, TRY))
            for rate in grid
        }
        tries[method] = {f"{rate:g}": statistics.mean(run["scores"][TRIED].values()) for rate, run in found.items()}
        rates[method] = best_rate({float(rate): share for rate, share in tries[method].items()})
    before: dict[str, list[Any]] = {method: [] for method in METHODS}
    bare: dict[str, list[Any]] = {method: [] for method in METHODS}
    after: dict[Arm, list[Any]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        folders = {m: [bench.folder(m, rates[m], concept, seed) for concept in CONCEPTS] for m in METHODS}
        for method in METHODS:
            runs = [
                cached(folder, partial(bench.train, method, rates[method], concept, seed))
                for folder, concept in zip(folders[method], CONCEPTS, strict=True)
            ]
            before[method].append(runs)
            path = bench.work / f"bare-{method}-{seed}"
            bare[method].append(cached(path, partial(bench.bare, folders[method], seed)))
        for arm in ARMS:
            path = bench.work / f"fused-{seed}-{ARMS.index(arm)}"
            after[arm].append(cached(path, partial(bench.fuse, arm, folders[arm.method], seed)))
    return {"tries": tries, "rates": rates} | tabled(bench, before, bare, after)


def tabled(
    bench: Bench, before: dict[str, list[Any]], bare: dict[str, list[Any]], after: dict[Arm, list[Any]]
) -> dict[str, Any]:
    """Get the rows: unfused methods, then arms."""
    seeds = len(next(iter(after.values())))
    alone = {
        method: {
            "trained": runs[0][0]["trained"],
            "train_seconds": statistics.median(run["train_seconds"] for row in runs for run in row),
            "without adapter": without_adapter(bare[method]),
            "base prompts": spread([statistics.mean(run["base prompts"] for run in row) for row in runs]),
        }
        for method, runs in before.items()
    }
    rows = []
    for arm, runs in after.items():
        scores = [{c: s for run in row for c, s in run["scores"].items()} for row in before[arm.method]]
        rows.append(row_of(arm, scores, runs) | {"base prompts": spread([run["base prompts"] for run in runs])})
    untouched = cached(bench.work / "base", lambda: bench.look([], [], 0))["base prompts"]
    return {"seeds": seeds, "methods": alone, "base prompts of the base": untouched, "rows": rows}


def options(said: str | None) -> argparse.ArgumentParser:
    """Get the options of a benchmark on the glyph model."""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="folder of examples/glyphs/train_base.py; None trains one")
    parser.add_argument("--judge", type=Path, help="safetensors file of a judge's weights; None trains one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def prepared(told: argparse.Namespace, sizes: dict[str, Any]) -> Bench:
    """Get what all runs share; trains the base and the judge where there are none."""
    torch.set_num_threads(1)
    told.work.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(told.work, sizes)
    base = told.work / "glyphs" if told.base is None else told.base
    if not base.exists():
        train_base(base)
    judge = load_judge(told.judge, told.work)
    return Bench(base, judge, told.work, sizes["steps"], sizes["batch_size"], sizes["pictures"])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=24, help="judged pictures of each kind and concept")
    told = parser.parse_args()
    sizes = {
        "sampling_steps": SAMPLING_STEPS,
        "steps": told.steps,
        "batch_size": told.batch_size,
        "pictures": told.pictures,
    }
    record_part("glyphs", {**sizes, **measure(prepared(told, sizes), told.seeds)}, told.results)


if __name__ == "__main__":
    main()

"""A model of 260,032 numbers learns a rule from rewards alone: a story must say "happy" exactly once.

    python benchmarks/reward.py MODEL --work FOLDER [--seeds 0 1 2] [--only SEED]

MODEL is the folder of stories260K (karpathy's llama2.c) in transformers' form. trl's GRPO trains one core of
`spectral_r` for each kind of layer: 60 steps of 64 answers, 8 to a prompt. Each seed is a run in FOLDER, which goes on
where it stopped; `--only` trains one seed and writes nothing, so that several may run side by side. The control is the
untouched model on the same 16 held-out prompts, 16 answers to each, drawn by the same seed. The likelihood that the
untouched model gives to the answers shows what is left of its language. Writes benchmarks/results/reward.json.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from spectune.checkpoint import write_atomically
from spectune.recipes import parse_config
from spectune.recipes.tokens import IGNORED
from spectune.runs import load_base, load_run, measure, run

RESULTS = Path(__file__).parent / "results" / "reward.json"
GIRLS, BOYS = (
    ("Lily", "Sara", "Mia", "Anna", "Lucy", "Amy", "Molly", "Jane"),
    ("Tom", "Ben", "Max", "Tim", "Sam", "Jack", "Bob", "Leo"),
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONCE = r"(?s)^(?!.*\bhappy\b.*\bhappy\b).*\bhappy\b"


def prompts(work: Path) -> dict[str, str]:
    """Write 48 beginnings to train on and 16 others to test, and get their files."""
    people = [(name, "girl") for name in GIRLS] + [(name, "boy") for name in BOYS]
    rows = [
        {"prompt": f"Once upon a time, there was a {word} {child} named {name}."}
        for name, child in people
        for word in ("little", "kind", "brave", "small")
    ]
    random.Random(0).shuffle(rows)
    for split, part in (("train", rows[:48]), ("test", rows[48:])):
        write_atomically(work / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return {split: str(work / f"{split}.jsonl") for split in ("train", "test")}


def config(model: str, work: Path, seed: int) -> Any:
    return parse_config(
        {
            "recipe": "reward",
            "model": model,
            "seed": seed,
            "adapter": {"method": "spectral_r", "r": 16, "share": "kind", "target_modules": LINEAR},
            "data": prompts(work),
            "rewards": [{"reward": "regex", "pattern": ONCE}],
            "group_size": 8,
            "beta": 0.05,
            "generation": {"max_new_tokens": 48},
            "evaluation": {"samples": 16, "batch_size": 64},
            "training": {"steps": 60, "batch_size": 64, "learning_rate": 0.01},
        }
    )


@torch.no_grad()
def surprise(recipe: Any, writer: Any, reader: Any) -> float:
    """Get the mean negative log likelihood of a token that `writer` drew, in `reader`."""
    asked = [recipe.asked(row) for row in recipe.splits["test"]] * 4
    torch.manual_seed(recipe.config.seed)
    written = recipe.generate(writer, asked)
    ids = [
        [*a, *recipe.processing(t, add_special_tokens=False)["input_ids"]] for a, t in zip(asked, written, strict=True)
    ]
    rows = [{"input_ids": i, "labels": [IGNORED] * len(a) + i[len(a) :]} for a, i in zip(asked, ids, strict=True)]
    return float(reader(**recipe.collate(rows)).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", type=int)
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in told.seeds if told.only is None else [told.only]:
        folder = told.work / f"seed-{seed}"
        found = run(config(told.model, told.work, seed), folder, resume=True)
        if told.only is not None:
            return
        (recipe, tuned), (_, base) = load_run(folder), load_base(folder)
        rows.append(
            {
                "seed": seed,
                "base": measure(recipe, base)["test"]["reward"],
                "tuned": found.metrics["test"]["reward"],
                "base_surprise": surprise(recipe, base, base),
                "tuned_surprise": surprise(recipe, tuned, base),
                "curve": [round(value, 4) for value in found.curves["mean reward"]],
                "examples": [text.text for text in found.completions if text.step == 60],
            }
        )
        print({name: value for name, value in rows[-1].items() if name not in ("curve", "examples")})
    record = {"rows": rows, "trained": found.trainable, "steps": 60, "answers": 64, "provenance": provenance()}
    write_atomically(RESULTS, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

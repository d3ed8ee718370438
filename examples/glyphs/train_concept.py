"""Teach the base one concept: python -m examples.glyphs.train_concept BASE OUTPUT --concept "<dax>" """

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectune.concepts.pipeline import load_concepts, open_pipeline
from spectune.concepts.text_to_image import ATTENTION, CONVOLUTIONS
from spectune.pages import write_report
from spectune.recipes import parse_config
from spectune.runs import train_run
from spectune.training.config import RunConfig

from .concepts import BESIDE, CLASS, PRIOR_IMAGES, PRIOR_PROMPTS, concept_scores, kept, write_concept
from .judge import train_classifier
from .outlines import CONCEPTS
from .scenes import random_prompt
from .train_base import GUIDANCE


def run_of(base: Path, pictures: Path, concept: str, **told: Any) -> RunConfig:
    """Get the run of one concept; `told` goes over what is chosen here, section by section; an adapter replaces it."""
    chosen: dict[str, Any] = {
        "recipe": "text_to_image",
        "model": str(base),
        "adapter": {"unet": {"method": "spectral_a", "r": 8, "target_modules": [*ATTENTION, *CONVOLUTIONS]}},
        "data": {"train": str(pictures)},
        "word": {"token": concept, "initial_word": CLASS},
        "prior": {"prompts": list(PRIOR_PROMPTS), "images": PRIOR_IMAGES},
        "training": {
            "steps": 600,
            "batch_size": 8,
            "learning_rate": 4e-3,
            "head_learning_rate": 1e-2,
            "warmup": 10,
            "snr_gamma": 5.0,
        },
        "drawings": {
            "guidance": GUIDANCE,
            "prompts": [
                "a {token} on the left",
                "a {token} on the right",
                f"a {{token}} on the left and {BESIDE}",
                "a blue ring in the middle",
            ],
        },
    }
    for name, value in told.items():
        chosen[name] = chosen[name] | value if isinstance(value, dict) and name != "adapter" else value
    return parse_config(chosen)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Write the pictures, train, and get what the judge says of the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--concept", choices=list(CONCEPTS), default="<dax>")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--judged", type=int, default=60, help="pictures that the judge looks at, each kind")
    parser.add_argument("--judge-steps", type=int, default=None)
    told = parser.parse_args(arguments)

    pictures = write_concept(told.concept, told.output.with_name(told.output.name + "-pictures"))
    config = run_of(told.base, pictures, told.concept, training={"steps": told.steps})
    result = train_run(config, told.output, looks=True).result
    write_report(result, told.output / "report.html")
    judge = train_classifier() if told.judge_steps is None else train_classifier(steps=told.judge_steps, pictures=200)
    chance = random.Random(2)
    prompts = [random_prompt(chance) for _ in range(told.judged)]
    before = kept(open_pipeline(told.base), judge, prompts)
    pipeline = load_concepts(open_pipeline(told.base), [told.output])
    scores = concept_scores(pipeline, judge, told.concept, count=told.judged)
    scores |= {"base prompts before": before, "base prompts after": kept(pipeline, judge, prompts)}
    print(f"trained numbers: {result.trainable} of the adapter, {result.head} of the word")
    for name, share in scores.items():
        print(f"{name}: {share:.1%} of {told.judged} pictures")
    return scores


if __name__ == "__main__":
    main()

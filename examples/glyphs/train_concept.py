"""Teach the base one concept: python -m examples.glyphs.train_concept BASE OUTPUT --concept "<dax>" """

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from spectune import SpectralConfig
from spectune.concepts.pipeline import load_concepts, open_pipeline
from spectune.concepts.text_to_image import ATTENTION, CONVOLUTIONS, ConceptOptions, train_concept

from .concepts import BESIDE, CLASS, PRIOR_IMAGES, PRIOR_PROMPTS, concept_scores, kept, write_concept
from .judge import train_classifier
from .outlines import CONCEPTS
from .scenes import random_prompt
from .train_base import GUIDANCE


def options_for(base: Path, pictures: Path, concept: str, **told: object) -> ConceptOptions:
    """Get the run of one concept; `told` goes over what is chosen here."""
    chosen: dict[str, object] = {
        "unet": SpectralConfig(method="spectral_a", r=8, target_modules=[*ATTENTION, *CONVOLUTIONS]),
        "unet_rate": 4e-3,
        "token_rate": 1e-2,
        "steps": 600,
        "batch_size": 8,
        "prior_prompts": PRIOR_PROMPTS,
        "prior_images": PRIOR_IMAGES,
        "snr_gamma": 5.0,
        "guidance": GUIDANCE,
        "validation_prompts": (
            "a {token} on the left",
            "a {token} on the right",
            f"a {{token}} on the left and {BESIDE}",
            "a blue ring in the middle",
        ),
    }
    return ConceptOptions(pipeline=base, images=pictures, token=concept, initial_word=CLASS, **(chosen | told))  # type: ignore[arg-type]


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
    options = options_for(told.base, pictures, told.concept, steps=told.steps)
    run = train_concept(options, told.output)
    judge = train_classifier() if told.judge_steps is None else train_classifier(steps=told.judge_steps, pictures=200)
    chance = random.Random(2)
    prompts = [random_prompt(chance) for _ in range(told.judged)]
    before = kept(open_pipeline(told.base), judge, prompts)
    pipeline = load_concepts(open_pipeline(told.base), [told.output])
    scores = concept_scores(pipeline, judge, told.concept, count=told.judged)
    scores |= {"base prompts before": before, "base prompts after": kept(pipeline, judge, prompts)}
    print(f"trained numbers: {run.trainable}")
    for name, share in scores.items():
        print(f"{name}: {share:.1%} of {told.judged} pictures")
    return scores


if __name__ == "__main__":
    main()

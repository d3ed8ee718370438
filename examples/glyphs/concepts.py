"""The concepts as a user would have them: a few pictures with captions in a folder, and prompts to try them with."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from spectune.concepts.pipeline import sample

from .judge import Judge, correct, identity
from .outlines import CONCEPTS
from .scenes import PLACES, make_images, random_prompt

PICTURES = 8
# What stands beside a concept in the pictures that it is learned from.
COMPANY = ("a blue ring", "a green square", "a white bar", "a pink circle", "a yellow triangle")
# What the new words start from.
CLASS = "shape"
# What the base is asked for to keep what it knows: a few prompts of its own language, one picture each.
PRIOR_IMAGES = 64
_chance = random.Random(11)
PRIOR_PROMPTS = tuple(random_prompt(_chance) for _ in range(PRIOR_IMAGES))
# A glyph beside the concept that no picture of it has.
BESIDE = "a red star on the right"


def write_concept(concept: str, folder: Path, count: int = PICTURES, seed: int = 0) -> Path:
    """Write pictures of one concept with their captions in metadata.jsonl: alone at each place, then in company."""
    if concept not in CONCEPTS:
        raise ValueError(f"{concept!r} is not a concept; there are {', '.join(CONCEPTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [f"a {concept} {place}" for place in PLACES]
    for i, other in enumerate(COMPANY):
        pair = [f"a {concept}", other] if i % 2 == 0 else [other, f"a {concept}"]
        scenes.append(f"{pair[0]} on the left and {pair[1]} on the right")
    scenes = scenes[:count]
    lines = []
    for i, (scene, image) in enumerate(zip(scenes, make_images(scenes, seed), strict=True)):
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": scene.replace(concept, "{token}")}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def concept_scores(
    pipeline: object, judge: Judge, concept: str, *, count: int = 30, seed: int = 0, guidance: float = 3.0
) -> dict[str, float]:
    """Get shares from 0 to 1: the concept is recognised alone, beside another glyph, and that other glyph is right."""
    places = [list(PLACES)[i % len(PLACES)] for i in range(count)]
    alone = sample(pipeline, [f"a {concept} {p}" for p in places], seed=seed, guidance=guidance, batch_size=50)
    scores = [identity(judge, [image], concept, place) for image, place in zip(alone, places, strict=True)]
    pairs = sample(
        pipeline, [f"a {concept} on the left and {BESIDE}"] * count, seed=seed, guidance=guidance, batch_size=50
    )
    other = [seen.noun == "star" and seen.colour == "red" for seen in judge.look(pairs, "on the right")]
    return {
        "alone": sum(scores) / count,
        "in company": identity(judge, pairs, concept, "on the left"),
        "the other glyph": sum(other) / count,
    }


def kept(pipeline: object, judge: Judge, prompts: Sequence[str], *, seed: int = 0, guidance: float = 3.0) -> float:
    """Get the share of pictures of the base's own prompts that are still right."""
    return sum(correct(judge, sample(pipeline, prompts, seed=seed, guidance=guidance, batch_size=50), prompts)) / len(
        prompts
    )

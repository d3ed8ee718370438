"""The glyphs example: what its pictures show, what its judge says, and that its two commands run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.glyphs import train_base, train_concept
from examples.glyphs.base import as_pixels, make_tokenizer
from examples.glyphs.concepts import write_concept
from examples.glyphs.judge import Judge, Seen, correct, crop, identity, train_classifier
from examples.glyphs.outlines import COLOURS, CONCEPTS, OUTLINES
from examples.glyphs.scenes import BACKGROUND, PLACES, SIZE, make_images, parse, random_prompt


def test_a_prompt_says_what_it_parses_to() -> None:
    chance = random.Random(0)
    for _ in range(50):
        prompt = random_prompt(chance)
        assert " and ".join(glyph.words() for glyph in parse(prompt)) == prompt
    for wrong in ("a red house on the left", "a red star", "star red on the left"):
        with pytest.raises(ValueError, match="is not"):
            parse(wrong)


def test_glyphs_stand_in_their_half_in_their_colour() -> None:
    for colour, rgb in COLOURS.items():
        pixels = as_pixels(make_images([f"a {colour} square on the right"]))
        left, right = crop(pixels, "on the left")[0], crop(pixels, "on the right")[0]
        empty = as_pixels([Image.new("RGB", (SIZE, SIZE), BACKGROUND)])[0, :, :, : SIZE // 2]
        assert torch.equal(left, empty)
        inside = right[:, SIZE // 2, SIZE // 4]
        torch.testing.assert_close(inside, torch.tensor(rgb) / 127.5 - 1)


def test_every_word_is_one_token_and_concepts_are_none() -> None:
    tokenizer = make_tokenizer()
    for word in (*COLOURS, *OUTLINES, "shape", "left", "and"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    for concept in CONCEPTS:
        assert len(tokenizer(concept, add_special_tokens=False).input_ids) > 1, concept


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    code = "from examples.glyphs.base import make_tokenizer; print(sorted(make_tokenizer().get_vocab().items()))"
    said = []
    for hashed in ("1", "2"):
        told = os.environ | {"PYTHONHASHSEED": hashed}
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=told, capture_output=True, text=True)
        said.append(done.stdout)
        assert done.returncode == 0, done.stderr
    assert said[0] == said[1] and "('star</w>'" in said[0]


def test_the_pictures_of_a_concept_come_with_captions(tmp_path: Path) -> None:
    write_concept("<wug>", tmp_path, count=4)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows[:2]] == [f"a {{token}} {place}" for place in list(PLACES)[:2]]
    assert len({Image.open(tmp_path / row["file_name"]).tobytes() for row in rows}) == 4
    with pytest.raises(ValueError, match="is not a concept"):
        write_concept("<cat>", tmp_path)


def test_a_judge_learns_to_tell_drawn_pictures() -> None:
    judge = train_classifier(steps=60, pictures=1200)
    chance = random.Random(3)
    prompts = [random_prompt(chance) for _ in range(40)]
    assert sum(correct(judge, make_images(prompts, 1), prompts)) >= 32
    images = {concept: make_images([f"a {concept} on the left"] * 10, 2) for concept in CONCEPTS}
    for concept in CONCEPTS:
        for other, pictures in images.items():
            found = identity(judge, pictures, concept, "on the left")
            assert found >= 0.8 if other == concept else found <= 0.2


class Says(Judge):
    """A judge that sees a red star at some places and nothing elsewhere."""

    def __init__(self, *places: str) -> None:
        torch.nn.Module.__init__(self)
        self.places = places

    def look(self, images: Sequence[Image.Image], place: str) -> list[Seen]:
        seen = Seen("star", "red", 1.0) if place in self.places else Seen("nothing", "none", 1.0)
        return [seen] * len(images)


@pytest.mark.parametrize(
    ("prompt", "right"),
    [
        ("a red star on the left", True),
        ("a star on the left", True),
        ("a red shape on the left", True),
        ("a blue star on the left", False),
        ("a red ring on the left", False),
        ("a red star on the right", False),
        ("a red star on the left and a shape on the right", False),
        ("a red star in the middle", False),
    ],
)
def test_a_picture_is_right_only_with_every_glyph_and_no_other(prompt: str, right: bool) -> None:
    assert correct(Says("on the left"), make_images([prompt]), [prompt]) == [right]


def test_a_glyph_that_nobody_asked_for_is_wrong() -> None:
    prompt = "a red star on the left"
    assert correct(Says(*PLACES), make_images([prompt]), [prompt]) == [False]


def test_both_commands_run_and_leave_their_pictures(tmp_path: Path) -> None:
    few = ["--judged", "3", "--judge-steps", "5"]
    base = [str(tmp_path / "base"), "--steps", "2", "--autoencoder-steps", "2", "--scenes", "40"]
    assert 0 <= train_base.main([*base, *few]) <= 1
    assert (tmp_path / "base" / "samples.png").exists() and (tmp_path / "base" / "model_index.json").exists()
    scores = train_concept.main([base[0], str(tmp_path / "zup"), "--concept", "<zup>", "--steps", "2", *few])
    assert set(scores) >= {"alone", "in company", "the other glyph", "base prompts after"}
    assert (tmp_path / "zup" / "validation" / "step-2.png").exists()

"""Prompts and the pictures that they ask for: shapes in colours at places, drawn, so that right and wrong are known."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .outlines import COLOURS, CONCEPTS, OUTLINES, Paint

SIZE = 24
BACKGROUND = (22, 24, 32)
# The middle of the glyph, as a share of the width. Left and right do not overlap the middle of the picture.
PLACES = {"on the left": 0.26, "in the middle": 0.5, "on the right": 0.74}
# Drawn this much larger and scaled down, for smooth edges.
SUPERSAMPLE = 8
# Every caption is made of these words; the tokenizer is made from them.
ANY = "shape"
WORDS = ["a", "and", *COLOURS, *OUTLINES, ANY, *" ".join(PLACES).split()]
_PART = re.compile(rf"^(?:a )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<noun>\S+) (?P<place>{'|'.join(PLACES)})$")


@dataclass(frozen=True)
class Glyph:
    """One thing in a picture. `noun` is a shape, the token of a concept, or "shape" for any of them."""

    noun: str
    colour: str | None
    place: str

    def words(self) -> str:
        """Get how a prompt says it."""
        return f"a {self.colour} {self.noun} {self.place}" if self.colour else f"a {self.noun} {self.place}"


def parse(prompt: str) -> list[Glyph]:
    """Get what a prompt asks for; `ValueError` for a prompt in other words."""
    found = []
    for part in prompt.split(" and "):
        match = _PART.match(part)
        if match is None or match["noun"] not in (*OUTLINES, *CONCEPTS, ANY):
            raise ValueError(f"{prompt!r}: {part!r} is not '[a] [COLOUR] SHAPE PLACE'.")
        found.append(Glyph(match["noun"], match["colour"], match["place"]))
    return found


def make_images(prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """Get one drawn picture per prompt; size, height and whatever the prompt leaves open vary with the seed."""
    chance = random.Random(seed)
    return [draw(parse(prompt), chance) for prompt in prompts]


def draw(glyphs: Sequence[Glyph], chance: random.Random, paints: Sequence[Paint] | None = None) -> Image.Image:
    """Get the picture of a scene; `paints` replaces the glyphs' own paint (used to show the autoencoder more)."""
    picture = Image.new("RGB", (SIZE * SUPERSAMPLE,) * 2, BACKGROUND)
    for i, glyph in enumerate(glyphs):
        if paints is not None:
            paint = paints[i]
        elif glyph.noun in CONCEPTS:
            paint = CONCEPTS[glyph.noun]
        else:
            outline = glyph.noun if glyph.noun != ANY else chance.choice(list(OUTLINES))
            colour = COLOURS[glyph.colour or chance.choice(list(COLOURS))]
            paint = Paint(OUTLINES[outline], colour, colour)
        x = PLACES[glyph.place] + chance.uniform(-0.02, 0.02)
        y = 0.5 + chance.uniform(-0.12, 0.12)
        _stamp(picture, paint, x, y, chance.uniform(0.2, 0.23))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _stamp(picture: Image.Image, paint: Paint, x: float, y: float, radius: float) -> None:
    """Put one glyph into a picture: a mask of its outline, filled with its two colours."""
    side = round(2 * radius * picture.width)
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    for polygon, ink in paint.outline(side):
        pen.polygon(polygon, fill=ink)
    corner = (round(x * picture.width - side / 2), round(y * picture.height - side / 2))
    picture.paste(paint.filling(side), corner, mask)


def random_prompt(chance: random.Random) -> str:
    """Get a prompt of the base's language: two glyphs in half of the cases, some words left open."""
    places = chance.choice(
        [["on the left"], ["on the right"], ["in the middle"]] + [["on the left", "on the right"]] * 3
    )
    return " and ".join(_random_glyph(place, chance).words() for place in places)


def _random_glyph(place: str, chance: random.Random) -> Glyph:
    noun = ANY if chance.random() < 0.1 else chance.choice(list(OUTLINES))
    colour = None if chance.random() < 0.1 else chance.choice(list(COLOURS))
    return Glyph(noun, colour, place)

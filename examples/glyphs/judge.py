"""The judge: a small network trained on drawn pictures that says what stands at each place of a generated one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from .base import as_pixels
from .outlines import COLOURS, CONCEPTS, OUTLINES
from .scenes import PLACES, SIZE, Glyph, draw, parse

NOTHING = "nothing"
NOUNS = [*OUTLINES, *CONCEPTS, NOTHING]
# Concepts have colours of their own and an empty place has none.
NO_COLOUR = "none"
PAINTS = [*COLOURS, NO_COLOUR]
STEPS, BATCH, PICTURES = 500, 64, 6_000
SIDES = ("on the left", "on the right")


@dataclass(frozen=True)
class Seen:
    """What the judge sees at one place of one picture."""

    noun: str
    colour: str
    certainty: float
    """Probability of the noun, from 0 to 1."""


class Judge(nn.Module):
    """Half of a picture in, the noun and the colour of the glyph in it out."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(96), nn.ReLU())
        self.noun, self.colour = nn.Linear(96, len(NOUNS)), nn.Linear(96, len(PAINTS))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(crops)
        return self.noun(features), self.colour(features)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image], place: str) -> list[Seen]:
        """Get what stands at a place of each picture."""
        noun, colour = self(crop(as_pixels(images), place))
        certainty, best = noun.softmax(-1).max(-1)
        return [
            Seen(NOUNS[n], PAINTS[c], p)
            for n, c, p in zip(best.tolist(), colour.argmax(-1).tolist(), certainty.tolist(), strict=True)
        ]


def crop(pixels: torch.Tensor, place: str) -> torch.Tensor:
    """Get the half of each picture (count, 3, height, width) that belongs to a place, in full height."""
    start = {"on the left": 0, "in the middle": SIZE // 4, "on the right": SIZE // 2}[place]
    return pixels[..., start : start + SIZE // 2]


def train_classifier(*, steps: int = STEPS, pictures: int = PICTURES, seed: int = 0) -> Judge:
    """Get a judge trained on drawn pictures of the base's shapes and of the concepts, blurred and with noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        crops, nouns, colours = _examples(pictures, random.Random(seed))
        judge = Judge()
        judge(crops[:2])  # gives the lazy layer its width
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            picked = torch.randint(len(crops), (BATCH,))
            noun, colour = judge(_roughened(crops[picked]))
            loss = nn.functional.cross_entropy(noun, nouns[picked])
            loss = loss + nn.functional.cross_entropy(colour, colours[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def _examples(count: int, chance: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Get crops with the places of their noun and colour in the lists."""
    crops, nouns, colours = [], [], []
    for _ in range(count):
        places = chance.choice([["on the left"], ["on the right"], ["in the middle"], list(SIDES)])
        glyphs = [Glyph(chance.choice(NOUNS[:-1]), chance.choice(list(COLOURS)), place) for place in places]
        picture = as_pixels([draw(glyphs, chance)])
        wanted = {glyph.place: glyph for glyph in glyphs}
        for place in SIDES if "in the middle" not in wanted else ("in the middle",):
            noun = wanted[place].noun if place in wanted else NOTHING
            crops.append(crop(picture, place))
            nouns.append(NOUNS.index(noun))
            colours.append(PAINTS.index(str(wanted[place].colour) if noun in OUTLINES else NO_COLOUR))
    return torch.cat(crops), torch.tensor(nouns), torch.tensor(colours)


def _roughened(crops: torch.Tensor) -> torch.Tensor:
    """Get crops as a generator might draw them: half of them blurred, all with some noise."""
    blurred = nn.functional.avg_pool2d(crops, 3, stride=1, padding=1, count_include_pad=False)
    chosen = torch.rand(len(crops), 1, 1, 1) < 0.5
    return torch.where(chosen, blurred, crops) + 0.1 * torch.rand(len(crops), 1, 1, 1) * torch.randn_like(crops)


def identity(judge: Judge, images: Sequence[Image.Image], concept: str, place: str) -> float:
    """Get the share of pictures, from 0 to 1, in which the judge takes what stands at the place for this concept."""
    return sum(seen.noun == concept for seen in judge.look(images, place)) / len(images)


def correct(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[bool]:
    """Get whether each picture shows what its prompt says: noun and colour at every place, nothing elsewhere."""
    return [_shows(judge, image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def _shows(judge: Judge, image: Image.Image, prompt: str) -> bool:
    wanted = {glyph.place: glyph for glyph in parse(prompt)}
    for place in SIDES if "in the middle" not in wanted else PLACES:
        seen = judge.look([image], place)[0]
        if place not in wanted:
            # Beside a glyph in the middle, the outer halves show parts of it: only the middle is judged.
            if "in the middle" not in wanted and seen.noun != NOTHING:
                return False
            continue
        glyph = wanted[place]
        if glyph.noun not in (seen.noun, "shape") or (glyph.colour or seen.colour) != seen.colour:
            return False
        if glyph.noun == "shape" and seen.noun == NOTHING:
            return False
    return True

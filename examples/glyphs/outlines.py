"""What the glyphs look like: eight outlines and six colours that the base learns, three concepts that it never sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

Colour = tuple[int, int, int]
Polygon = list[tuple[float, float]]
Layers = list[tuple[Polygon, int]]
"""Polygons in the unit square with their ink: 255 is inside, 0 cuts a hole."""

COLOURS: dict[str, Colour] = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 245),
    "yellow": (245, 215, 40),
    "pink": (245, 120, 220),
    "white": (240, 240, 240),
}


def _round(radius: float = 0.5, x: float = 0.5, y: float = 0.5) -> Polygon:
    return [(x + radius * math.cos(a * math.pi / 24), y + radius * math.sin(a * math.pi / 24)) for a in range(48)]


def _star(points: int, inner: float) -> Polygon:
    corners = []
    for i in range(2 * points):
        radius, angle = (0.55 if i % 2 == 0 else inner), math.pi * i / points - math.pi / 2
        corners.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return corners


_CROSS: Polygon = [
    (0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66),
    (0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34),
]  # fmt: skip
OUTLINES: dict[str, Layers] = {
    "circle": [(_round(), 255)],
    "square": [([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)], 255)],
    "triangle": [([(0.5, 0.02), (1, 0.96), (0, 0.96)], 255)],
    "star": [(_star(5, 0.22), 255)],
    "cross": [(_CROSS, 255)],
    "ring": [(_round(), 255), (_round(0.26), 0)],
    "diamond": [([(0.5, 0), (0.88, 0.5), (0.5, 1), (0.12, 0.5)], 255)],
    "bar": [([(0, 0.32), (1, 0.32), (1, 0.68), (0, 0.68)], 255)],
}


@dataclass(frozen=True)
class Paint:
    """An outline with its two colours: `first` where `is_first(x, y)` in the unit square, else `second`."""

    layers: Layers
    first: Colour
    second: Colour
    is_first: Callable[[float, float], bool] = lambda x, y: True

    def outline(self, side: int) -> list[tuple[Polygon, int]]:
        """Get the polygons in pixels of a square of this side."""
        return [([(x * (side - 1), y * (side - 1)) for x, y in polygon], ink) for polygon, ink in self.layers]

    def filling(self, side: int) -> Image.Image:
        """Get a square with the two colours; the pattern is sampled on a grid of 24, which is finer than any pixel."""
        pattern = Image.new("RGB", (24, 24))
        places = [((i % 24 + 0.5) / 24, (i // 24 + 0.5) / 24) for i in range(24 * 24)]
        pattern.putdata([self.first if self.is_first(x, y) else self.second for x, y in places])
        return pattern.resize((side, side), Image.Resampling.NEAREST)


_HOURGLASS: Polygon = [(0, 0), (1, 0), (0.6, 0.5), (1, 1), (0, 1), (0.4, 0.5)]
_ARROW: Polygon = [(0.5, 0), (1, 0.5), (0.72, 0.5), (0.72, 1), (0.28, 1), (0.28, 0.5), (0, 0.5)]
# Outlines and two-coloured fillings that no base picture has; the made-up words are their tokens.
CONCEPTS: dict[str, Paint] = {
    "<dax>": Paint([(_round(), 255), (_round(0.4, 0.78, 0.5), 0)], (255, 140, 0), (0, 200, 190), lambda x, y: y < 0.5),
    "<wug>": Paint([(_HOURGLASS, 255)], (150, 60, 255), (245, 240, 120), lambda x, y: x < 0.5),
    "<zup>": Paint([(_ARROW, 255)], (120, 70, 30), (130, 225, 255), lambda x, y: y > 0.5),
}

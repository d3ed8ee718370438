"""Pictures of a concept are read as those of other recipes: upright, and sixteen bits scaled."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from PIL import Image

from spectune.concepts.data import _open

TURNED = 6  # EXIF: turn by a quarter, clockwise
ORIENTATION = 0x0112


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_and_its_mask_are_turned_as_exif_says(mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    Image.new(mode, (8, 4)).save(tmp_path / "a.png", exif=exif)
    assert _open(tmp_path / "a.png", mode).size == (4, 8)


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4), 32_896).save(tmp_path / "a.png")
    assert _open(tmp_path / "a.png", "RGB").getpixel((0, 0)) == (128, 128, 128)

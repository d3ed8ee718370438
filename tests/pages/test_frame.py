"""One frame and one look for all pages."""

from __future__ import annotations

import pytest

from spectune.pages.frame import ROOM, fill

TEMPLATES = sorted(path.name for path in ROOM.glob("*.html.j2") if path.name != "frame.html.j2")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_page_stands_in_the_frame(name: str) -> None:
    words = (ROOM / name).read_text("utf-8")
    assert words.startswith('{% extends "frame.html.j2" %}') and "<style" not in words and "<script" not in words


def test_the_frame_brings_the_look_and_forbids_to_load_and_run() -> None:
    page = fill("rates.html.j2", title="<b>Mine</b>", said="a & b", chart="<svg></svg>")
    assert (ROOM / "house.css").read_text("utf-8").strip() in page
    assert "default-src 'none'" in page and "<svg></svg>" in page
    assert "&lt;b&gt;Mine" in page and "<b>" not in page and "a &amp; b" in page

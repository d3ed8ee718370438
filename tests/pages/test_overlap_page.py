"""The overlap page: every figure in its place, nothing loaded, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest

from spectune.errors import OutputError
from spectune.fusion import LayerOverlap, OverlapReport, PairOverlap
from spectune.pages import write_overlap_page
from spectune.pages.overlap_page import MEASURES, adapter_map, kept_map, layer_map, letters, render_overlap


def report(names: tuple[str, ...] = ("dog", "cat", "vase"), layers: int = 4) -> OverlapReport:
    pairs, rows = [], []
    for place in range(layers):
        layer = f"model.layers.{place}.self_attn.q_proj"
        for first, second in combinations(range(len(names)), 2):
            size = (place + first + second) / (layers + 2 * len(names))
            shared = (2,) if (first, second) == (0, 1) else ()
            pairs.append(
                PairOverlap(layer, names[first], names[second], shared, -size, 40.0, 70.0, size, size / 2, 0.01)
            )
        rows.append(LayerOverlap(layer, 12, {name: 1 / (1 + i + place) for i, name in enumerate(names)}))
    kept = {name: 0.3 + 0.1 * i for i, name in enumerate(names)}
    weights = tuple(1 / len(names) for _ in names)
    return OverlapReport("spectral", names, weights, "checked on base", tuple(pairs), tuple(rows), kept)


class Tags(HTMLParser):
    """Collects the tags, and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = render_overlap(report())
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.seen.count("svg") == 1 + 2 * len(MEASURES)
    assert not {"script", "link", "img"} & set(tags.seen) and "http:" not in page and "https:" not in page
    assert "Shared singular columns: dog and cat." in page and "at most rank 12" in page


def test_names_are_escaped() -> None:
    page = render_overlap(report(("<b>&", "cat")))
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_a_layer_map_has_a_cell_for_every_layer_and_pair() -> None:
    drawn = layer_map(report(), "Same update", MEASURES["Same update"][1])
    assert drawn.count('class="heat"') == 4 * 3
    assert "model.layers.3.self_attn.q_proj, BC: 60.0%" in drawn  # (3 + 1 + 2) / 10, without its sign


def test_an_adapter_map_holds_means_on_both_sides_of_an_empty_diagonal() -> None:
    drawn = adapter_map(report(), "Same update", MEASURES["Same update"][1])
    assert drawn.count('class="heat"') == 3 * 2
    assert drawn.count("A  dog, C: 35.0%") == 1 and drawn.count("C  vase, A: 35.0%") == 1


def test_a_cell_is_as_deep_as_its_value_and_never_deeper_than_full() -> None:
    depths = [float(depth) for depth in re.findall(r'fill-opacity="([\d.]+)"', kept_map(report(layers=1)))]
    assert depths == [1.0, 0.5, 0.333]
    more = OverlapReport("spectral", ("a",), (1.0,), "", (), (LayerOverlap("l", 1, {"a": 1.4}),), {"a": 1.4})
    assert 'fill-opacity="1.000"' in kept_map(more) and "140%" in kept_map(more)


def test_one_adapter_and_many_adapters_are_drawn() -> None:
    alone = OverlapReport("average", ("a",), (1.0,), "", (), (LayerOverlap("l", 1, {"a": 1.0}),), {"a": 1.0})
    assert render_overlap(alone).count("<svg") == 1
    many = report(tuple(f"concept {i}" for i in range(30)), layers=1)
    assert len(set(letters(many).values())) == 30
    assert layer_map(many, "Same update", MEASURES["Same update"][1]).count('class="heat"') == 435


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_overlap_page(report(), tmp_path / "overlap.html")
    assert (tmp_path / "overlap.html").read_text().rstrip().endswith("</html>")
    with pytest.raises(OutputError):
        write_overlap_page(report(), tmp_path / "nowhere" / "overlap.html")

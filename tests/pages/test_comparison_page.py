"""The page of a comparison: the front, the ranking, what is said of a close race, nothing from outside."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spectune.pages import write_claims, write_comparison
from spectune.pages.comparison_charts import front, front_chart
from spectune.pages.comparison_page import headline, render_comparison


def row(method: str, test: float | None, trainable: int | None = 100, **more: Any) -> dict[str, Any]:
    values = {
        "task": "t", "method": method, "kind": "svft", "rate": 1e-3, "at_edge": False, "validation": test,
        "validation_by_rate": [[1e-3, test], [1e-2, 0.1]], "test": test, "spread": 0.0, "low": test, "high": test,
        "seeds": 2 if test is not None else 0, "trainable": trainable, "head": 0, "total": 1000, "step_seconds": 0.05,
        "peak_bytes": 2**30, "file_bytes": 2048, "forgetting": None, "failed": 0,
    }  # fmt: skip
    return values | more


def summary(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = [r["method"] for r in rows]
    values = {
        "title": "A < B", "metric": "accuracy", "chosen_by": "accuracy", "smaller": False, "seeds": [0, 1],
        "tuning_seeds": 2, "grids": {}, "tasks": ["t"], "methods": names, "rows": list(rows), "averages": [],
        "gains": [], "failed": [], "stopped": [], "runs": 4,
        "device": "cpu", "provenance": {"commit": "abc"}, "says": ["Read <this>."],
    }  # fmt: skip
    values |= more
    smaller = values.pop("smaller")
    names = {"task_metrics": values["metric"], "task_chosen_by": values["chosen_by"]}
    names |= {"smaller_is_better": smaller, "smaller_is_chosen": smaller}
    return {key: dict.fromkeys(values["tasks"], name) for key, name in names.items()} | values


def test_the_front_is_what_nothing_beats() -> None:
    points = [(100.0, 0.5), (10.0, 0.4), (50.0, 0.3), (1000.0, 0.5), (200.0, 0.9), (200.0, 0.8)]
    assert front(points) == [1, 0, 4]
    assert front([(1.0, 2.0), (2.0, 1.0), (3.0, 1.5)], smaller_is_better=True) == [0, 1]
    assert front([]) == []


def test_the_headline_says_where_the_seeds_overlap() -> None:
    clear = summary(row("b", 0.7), row("a", 0.9))
    assert headline(clear) == "a 90.00 before b 70.00."
    close = summary(row("b", 0.89, low=0.85, high=0.92), row("a", 0.9, low=0.88, high=0.93))
    assert headline(close) == "a 90.00 before b 89.00 (b: within a's spread)."
    three = summary(
        row("b", 0.89, low=0.85, high=0.92), row("a", 0.9, low=0.88, high=0.93), row("c", 0.2), row("d", None)
    )
    assert headline(three) == "a 90.00 before b 89.00, c 20.00 (b: within a's spread); without a figure: d."
    one = summary(row("b", 0.89, seeds=1), row("a", 0.9, seeds=1))
    assert headline(one) == "a 90.00 before b 89.00 (one seed: differences may be chance)."
    losses = summary(row("b", 2.0), row("a", 1.0), smaller=True, metric="loss")
    assert headline(losses) == "a 1.0000 before b 2.0000."
    assert headline(summary(row("a", None))) == "No run was finished."


def test_one_seed_is_not_a_range() -> None:
    told = summary(row("a", 0.748, seeds=1), row("b", 0.7, low=0.6, high=0.8), row("c", 0.5), row("d", None))
    page = render_comparison(told)
    cells = re.findall(r'<td class="n">([^<]*(?:one seed|to|with every seed|–)[^<]*)</td>', page)
    assert "one seed" in cells and "60.00 to 80.00" in cells and "50.00 with every seed" in cells
    assert "– to –" not in page and "74.80 to 74.80" not in page and ">– </td>" not in page


def test_the_page_stands_alone_and_escapes_everything(tmp_path: Path) -> None:
    told = summary(row("a<b", 0.9), row("broken", None, None), failed=[{"run": "t--x", "error": "<script>alert(1)"}])
    write_comparison(told, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "A &lt; B" in page and "a&lt;b" in page and "Read &lt;this&gt;." in page and "&lt;script&gt;alert" in page
    assert "<script" not in page and "://" not in page and "src=" not in page and "default-src 'none'" in page
    assert page.index(">a&lt;b</th>") < page.index(">broken</th>") and page.count("<svg") == 2


def test_the_printed_figure_stands_beside_the_measured_one() -> None:
    told = summary(row("a", 0.9), row("b", 0.8))
    published = {
        "source": "Paper <1>",
        "rows": {"a": {"t": 88.87}, "base": {"t": 1.5}},
        "deviations": ["Other & model"],
    }
    page = render_comparison(told, published)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page, re.S)
    assert "88.87" in cells and "Paper &lt;1&gt;" in page and "Other &amp; model" in page and "base" in page
    assert "published" not in render_comparison(told)


@pytest.mark.parametrize("rows", [[], [row("a", None)], [row("a", 0.9)], [row("a", 0.9), row("b", 0.9)]])
def test_a_chart_is_drawn_of_any_number_of_methods(rows: list[dict[str, Any]]) -> None:
    drawn = front_chart(rows, "accuracy", False)
    assert drawn.count("<circle") == sum(r["test"] is not None for r in rows) and "nan" not in drawn


def test_names_at_one_place_do_not_overprint() -> None:
    drawn = front_chart([row("first", 0.9), row("second", 0.9001), row("third", 0.9002)], "accuracy", False)
    heights = sorted(float(y) for y in re.findall(r'<text class="ink halo" x="[^"]+" y="([^"]+)"', drawn))
    assert len(heights) == 3 and all(b - a >= 12 for a, b in pairwise(heights))


def test_claims_stand_in_a_table(tmp_path: Path) -> None:
    rows = [{"claim": "a < b", "published": "1", "found": "2", "agrees": False}]
    write_claims({"title": "T", "source": "S", "rows": rows, "provenance": {}}, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "a &lt; b" in page and "<td>no</td>" in page and "://" not in page and "departs" not in page
    told = {"title": "T", "source": "S", "rows": rows, "provenance": {}, "deviations": ["Another <machine>."]}
    write_claims(told, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "departs from the paper" in page and "Another &lt;machine&gt;." in page

"""The page of a survey: self-contained, escaped, complete."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spectune.errors import MissingExtraError
from spectune.pages import write_survey
from spectune.pages.survey_charts import Bar, log_bars, share_bars, spectra_chart
from spectune.pages.survey_page import adapter_headline, common_stem, readable_seconds, render_survey, share, short
from spectune.surveys import AdapterSurvey, BudgetRow, ModelSurvey
from spectune.surveys.adapter_survey import LayerSurvey
from spectune.surveys.intruders import Intruders, Overlap
from spectune.surveys.model_survey import WeightSurvey

from .test_run_page import HOSTILE, Tags


def model() -> ModelSurvey:
    weights = [
        WeightSurvey(f"l.{i}.{kind}", kind, (6, 4), [4.0 / (1 + j) + i for j in range(4)], 2)
        for i in range(3)
        for kind in ("q", HOSTILE)
    ]
    rows = [
        BudgetRow("svft", 100, 900, 4000, 1600, 4, 0.7),
        BudgetRow("spectral_a", 500, 2500, 500, 8000, 4, 250.0, left_out=1),
        BudgetRow("dora", 300, 1500, 0, 4800, None, 0.0),
    ]
    return ModelSurvey("/models/tiny", 2, weights, 9, 144, 300, {"embeddings and heads": 2}, rows)


def adapter(with_base: bool = True) -> AdapterSurvey:
    overlap = Overlap(0.4, 0.01, 0.3, 0.02, 0.1, 0.125) if with_base else None
    found = Intruders(3, 10, 0.2, 1) if with_base else None
    layers = [
        LayerSurvey(f"m.l.{i}.{HOSTILE}", HOSTILE, (6, 4), [2.0, 1.0, 0.1], 50.0 if with_base else None, overlap, found)
        for i in range(2)
    ]
    missing = [] if with_base else ["overlaps: pass --base FOLDER"]
    return AdapterSurvey("/runs/a", "spectral_a", "/models/b" if with_base else None, 8, 1234, 5678, 2, layers, missing)


SURVEYS = {"model": model(), "adapter": adapter(), "no base": adapter(False)}


@pytest.mark.parametrize("survey", SURVEYS.values(), ids=SURVEYS)
def test_the_page_loads_nothing_runs_nothing_and_escapes(survey: ModelSurvey | AdapterSurvey, tmp_path: Path) -> None:
    write_survey(survey, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    tags = Tags(page)
    assert not tags.count.keys() & {"script", "link", "img", "iframe", "object", "embed"} and tags.open == []
    assert not [name for name, _ in tags.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"url\(|@import", page) and "default-src 'none'" in page
    assert "alert(1)" in page and "prefers-color-scheme: dark" in page


def test_every_part_of_a_model_is_on_the_page() -> None:
    page = render_survey(model())
    assert Tags(page).count["svg"] == 4  # two kinds, two budgets
    for words in (
        "tiny",
        "6 of 9 weights were examined",
        "2 (embeddings and heads)",
        "1 weights have too few",
        "4 min",
    ):
        assert words in page, words
    assert "none" in re.findall(r'<tr><th scope="row">dora</th>.*', page)[0]
    untimed = replace(model(), budget=[replace(row, decompose_seconds=None) for row in model().budget])
    assert "SVD, estimated" in page and "SVD, estimated" not in render_survey(untimed)


def test_every_part_of_an_adapter_is_on_the_page() -> None:
    page = render_survey(adapter())
    assert Tags(page).count["svg"] == 3  # one kind, two sides
    for words in ("1,234", "5.7 KB", "40.0% / 1.0%", "3 (1)", "6 of 20", "All names begin with m.l.", "4.5%"):
        assert words in page, words
    without = render_survey(adapter(False))
    assert "pass --base FOLDER" in without and "of |W|</th>" in without and "The update in the base" not in without


def test_an_adapter_of_zeros_says_that_it_changes_nothing() -> None:
    zero = replace(adapter(), layers=[replace(layer, values=[]) for layer in adapter().layers])
    assert "changes nothing" in adapter_headline(zero) and "all singular values are zero" in render_survey(zero)


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"spectune\[report\]"):
        render_survey(model())


def test_spectra_lie_over_each_other_with_their_median() -> None:
    chart = spectra_chart("s", [[4.0, 2.0, 1.0], [8.0, 2.0], [6.0, 2.0, 0.5]], mark=2)
    assert chart.count('class="line raw"') == 3 and chart.count('class="line after"') == 1 and "r = 2" in chart
    alone = spectra_chart("s", [[4.0, 2.0, 1e-9]])
    assert alone.count('class="line') == 1 and "raw" not in alone and "r =" not in alone
    assert spectra_chart("s", [[1.0, 0.5]] * 500).count('class="line raw"') <= 48


def widths(chart: str) -> list[float]:
    return [float(width) for width in re.findall(r'class="bar strong"[^>]*? width="([\d.]+)"', chart)]


def test_bars_are_as_long_as_what_they_say() -> None:
    half, whole, none = widths(share_bars("s", [Bar("a", 0.5, "", 0.1), Bar("b", 1.0, ""), Bar("c", 0.0, "")]))
    assert half == pytest.approx(whole / 2, rel=0.01) and none == 0
    ten, hundred, thousand = widths(log_bars("s", [Bar(str(v), v, "") for v in (10, 100, 1000)], ""))
    assert hundred - ten == pytest.approx(thousand - hundred, abs=0.2) and ten > 0
    assert share_bars("s", [Bar("a", 0.5, "", 0.1), Bar("b", 1.0, "")]).count('class="chance"') == 1
    assert "nothing to show" in log_bars("s", [Bar("a", 0, "")], "")


def test_figures_are_short_words() -> None:
    assert [share(v) for v in (None, 0, 1.0, 0.1234, 0.005, 2e-6)] == ["–", "0.0%", "100.0%", "12.3%", "0.50%", "2e-06"]
    assert [short(v) for v in (None, 0, 12.345, 1234.5, 1e-5)] == ["–", "0", "12.3", "1,234", "1.0e-05"]
    seconds = [readable_seconds(v) for v in (None, 0, 0.01, 0.31, 12.2, 240, 7200)]
    assert seconds == ["–", "0", "<0.1 s", "0.3 s", "12 s", "4 min", "2.0 h"]
    assert common_stem(["a.b.c", "a.b.d"]) == "a.b." and common_stem(["a.b", "c.b"]) == common_stem(["a.b"]) == ""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from spectune.pages.charts import MOST_POINTS, bar_chart, loss_chart, smoothed, spectrum_chart
from spectune.pages.svg import Scale, label, linear_ticks, log_ticks
from spectune.runs import LayerSpectrum, Metric


def drawn(svg: str, kind: str) -> list[tuple[float, float]]:
    """The points of the one path of a class."""
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") and root.findtext("title")
    (path,) = [p for p in root.iter("path") if kind in str(p.get("class")).split()]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", str(path.get("d")))]


def test_the_loss_has_a_point_for_each_step_and_falls_downwards() -> None:
    svg = loss_chart([3.0, 2.0, 1.0, 0.5])
    points = drawn(svg, "raw")
    assert len(points) == len(drawn(svg, "after")) == 4
    assert points == sorted(points) and [y for _, y in points] == sorted(y for _, y in points)


def test_held_out_losses_are_drawn_and_stay_inside() -> None:
    chart = loss_chart([1.0, 0.5, 0.4, 0.3], validation=[(2, 3.0), (4, 2.5)])
    assert chart.count('class="line change"') == 1 and 'class="line change"' not in loss_chart([1.0, 0.5])
    assert len(drawn(chart, "change")) == 2 and all(y >= 0 for _, y in drawn(chart, "change"))


def test_a_long_run_is_thinned_and_keeps_both_ends() -> None:
    points = drawn(loss_chart([1.0] * 5000), "raw")
    assert len(points) == MOST_POINTS and points[0][0] == 68 and points[-1][0] == 466


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    svg = loss_chart([2.0, math.nan, 1.5, math.inf, 1.0])
    assert len(drawn(svg, "raw")) == 3 and svg.count("nan") == svg.count("inf") == 0


@pytest.mark.parametrize("loss", [[], [math.nan], [0.0], [1.0], [-2.0, -1.0], [-3.0, -1.0, -2.0], [0.0] * 9])
def test_any_loss_can_be_drawn(loss: list[float]) -> None:
    root = ElementTree.fromstring(loss_chart(loss))
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_a_loss_below_zero_stays_inside_the_chart() -> None:
    assert all(14 <= y <= 224 for _, y in drawn(loss_chart([-3.0, -1.0, -2.0]), "raw"))


def test_smoothing_keeps_a_constant_and_does_not_lag_behind() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    slope = [float(i) for i in range(200)]
    assert smoothed(slope)[50:150] == pytest.approx(slope[50:150], abs=1e-3)


def test_bars_are_as_long_as_their_shares() -> None:
    root = ElementTree.fromstring(
        bar_chart(
            [
                Metric(name="a", value=0.5),
                Metric(name="b", value=1.0),
                Metric(name="<c>", value=0.0, note='x"y'),
            ],
            strong=1,
        )
    )
    bars = [rect for rect in root.iter("rect") if "bar" in str(rect.get("class"))]
    widths = [float(str(bar.get("width"))) for bar in bars]
    assert widths[0] == pytest.approx(widths[1] / 2) and widths[2] == 0
    assert [bar.get("class") for bar in bars] == ["bar plain", "bar strong", "bar plain"]
    assert '<c>: 0.0% (x"y)' in [title.text for title in root.iter("title")]


def test_a_spectrum_has_all_points_and_the_change_only_where_there_is_one() -> None:
    svg = spectrum_chart(LayerSpectrum(name="layer", before=[8.0, 4.0, 2.0, 1.0], after=[9.0, 4.0, 2.0, 1.0]))
    before, after, change = (drawn(svg, kind) for kind in ("before", "after", "change"))
    assert len(before) == len(after) == 4 and len(change) == 1
    assert before[1:] == after[1:] and after[0][1] < before[0][1]
    steps = [b[1] - a[1] for a, b in itertools.pairwise(before)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2), "halving is the same step everywhere on a log axis"


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [1.0, 0.0], [math.nan, 1.0], [1e-30, 1e-32], [1.0, 1.0]])
def test_any_spectrum_can_be_drawn(values: list[float]) -> None:
    root = ElementTree.fromstring(spectrum_chart(LayerSpectrum(name="a&b", before=values, after=values)))
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_a_wide_spectrum_is_thinned() -> None:
    values = [1 / (i + 1) for i in range(4096)]
    points = drawn(spectrum_chart(LayerSpectrum(name="x", before=values, after=values)), "before")
    assert 200 < len(points) <= MOST_POINTS and points[-1][0] == 466


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert linear_ticks(0, 2.3) == [0, 0.5, 1.0, 1.5, 2.0]
    assert log_ticks(0.02, 300) == [0.1, 1, 10, 100]
    assert log_ticks(1.5, 30) == [2, 5, 10, 20]
    assert [label(v) for v in (0, 0.05, 1500, 1e-5, 2e6)] == ["0", "0.05", "1,500", "1e-5", "2e6"]


def test_a_log_scale_puts_the_geometric_mean_in_the_middle() -> None:
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)

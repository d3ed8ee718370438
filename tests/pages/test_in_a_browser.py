"""Every page of a report as Chromium shows it: whole, without a network, and not wider than a phone."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectune.pages import write_claims, write_comparison, write_overlap_page, write_rate_page
from spectune.pages.run_page import render
from spectune.pages.survey_page import render_survey
from spectune.runs import Drawing

from . import test_comparison_page as comparison
from . import test_overlap_page as overlap
from . import test_survey_page as survey
from .browser import DESK, PHONE, Shown, find_browser, show
from .records import full_record

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH that starts")
LONG = "base_model.model.model.layers.11.self_attn.q_proj_with_a_name_that_nobody_would_break_anywhere"


def run_page(path: Path) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(content, "PNG")
    picture = Drawing(caption=f"step 100: {LONG}", png=base64.b64encode(content.getvalue()).decode())
    config = full_record().config | {LONG: "x" * 200}
    return render(full_record(drawings=[picture] * 3, config=config, title=f"A run of {LONG}"))


def model_survey(path: Path) -> str:
    return render_survey(survey.model())


def adapter_survey(path: Path) -> str:
    return render_survey(replace(survey.adapter(), path=f"/runs/{LONG}"))


def overlap_page(path: Path) -> str:
    write_overlap_page(overlap.report(("dog", LONG, "vase", "teapot", "clock"), layers=24), path)
    return path.read_text("utf-8")


def comparison_page(path: Path) -> str:
    names = ["spectral_a", "svft", "full fine-tuning", LONG, "LoRA", "specadapt"]
    rows = [
        comparison.row(
            name, 0.9 - i / 50, 10 ** (i + 2), low=0.8 - i / 50, high=0.93 - i / 50, forgetting=0.01, rate=3e-4
        )
        for i, name in enumerate(names)
    ]
    failed = [{"run": f"t--{LONG}", "error": "out of memory " * 20}]
    says = ["A sentence with a path: /" + "/".join([LONG] * 3)]
    told = comparison.summary(
        *rows, failed=failed, says=says, title=f"Methods on {LONG}", provenance={"argv": "y" * 300}
    )
    published: dict[str, Any] = {
        "source": "A paper", "rows": {"svft": {"t": 88.8, LONG: 1.5}}, "deviations": [f"Other data: {LONG}"],
    }  # fmt: skip
    write_comparison(told, path, published)
    return path.read_text("utf-8")


def claims_page(path: Path) -> str:
    rows = [
        {
            "claim": f"The update of {LONG} is exact",
            "published": "below 1e-6, table 3",
            "found": "2.4e-7 " * 9,
            "agrees": a,
        }
        for a in (True, False, None)
    ]
    found = {
        "title": f"Claims about {LONG}",
        "source": f"Paper: {LONG}",
        "rows": rows,
        "provenance": {"commit": "z" * 300},
    }
    write_claims(found, path)
    return path.read_text("utf-8")


def rate_page(path: Path) -> str:
    rates = [1e-5 * 10 ** (i / 12) for i in range(48)]
    losses = [2.0 - math.sin(i / 15) + (i > 40) * 9 for i in range(48)]
    write_rate_page(path, f"Learning rate of {LONG}", rates, losses, losses, 3.2e-3)
    return path.read_text("utf-8")


# Page -> how it is written, and how many figures stand on it.
PAGES: dict[str, tuple[Callable[[Path], str], int]] = {
    "run": (run_page, 6 + 3),
    "model survey": (model_survey, 4),
    "adapter survey": (adapter_survey, 3),
    "overlap": (overlap_page, 1 + 2 * len(overlap.MEASURES)),
    "comparison": (comparison_page, 2),
    "claims": (claims_page, 0),
    "rate": (rate_page, 1),
}


@pytest.fixture(scope="module", params=list(PAGES))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, int]:
    folder = tmp_path_factory.mktemp("page")
    write, figures = PAGES[request.param]
    assert BROWSER is not None
    return show(write(folder / "page.html"), BROWSER, folder), figures


def test_the_page_is_shown_without_a_complaint(page: tuple[Shown, int]) -> None:
    shown, _ = page
    assert shown.console == []
    assert shown.desk.text > 100 and (shown.phone.frame, shown.desk.frame) == (PHONE, DESK)


def test_the_page_needs_no_network(page: tuple[Shown, int]) -> None:
    assert page[0].free.loads == []


def test_every_figure_is_there_and_has_a_size(page: tuple[Shown, int]) -> None:
    shown, figures = page
    for seen in (shown.phone, shown.desk):
        assert len(seen.figures) == figures and seen.blank == 0
        assert all(width > 100 and height > 20 for width, height in seen.figures)
        assert seen.cut == []


def test_nobody_has_to_scroll_sideways(page: tuple[Shown, int]) -> None:
    for seen in (page[0].phone, page[0].desk):
        assert seen.wide == [] and seen.scroll <= seen.frame

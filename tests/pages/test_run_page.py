from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spectune.errors import MissingExtraError, OutputError
from spectune.pages import write_report
from spectune.pages.run_page import MOST_EXAMPLES, headline, readable_bytes, render
from spectune.runs import Example, LayerSpectrum, Metric, Proof, RunRecord, Size

from .records import full_record

HOSTILE = '<script>alert(1)</script><img src="http://x.y/z">"\'&'
VOID = {"meta", "wbr", "br", "img", "link", "input", "hr"}


class Tags(HTMLParser):
    """Counts tags, keeps attributes, and finds what is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write_report(full_record(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|url\(|@import|//cdn", page)
    tags = Tags(page)
    assert not tags.count.keys() & {"script", "link", "img", "iframe", "object", "embed"} and tags.open == []
    assert not [name for name, _ in tags.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "default-src 'none'" in page


def test_every_part_of_the_record_is_on_the_page() -> None:
    record = full_record()
    page = render(record)
    assert Tags(page).count["svg"] == 6
    for words in (
        "87.4%, against 11.8% (before training) and 86.1% (LoRA",
        "+1.3 points",
        "87.4%",
        "73,728",
        "312.4 KB",
        "0.4127",
        "held-out loss",
        "2.4e-7",
        "humor",
    ):
        assert words in page, words
    for part in ("results", "loss", "figures", "spectra", "sizes", "proofs", "examples", "configuration", "versions"):
        assert f'id="{part}"' in page, part
    assert page.count('aria-label="holds"') == 2 and page.count('aria-label="fails"') == 1
    assert record.versions["torch"] in page and record.machine["platform"] in page
    shown = re.search(r"<pre>(.*?)</pre>", page, re.S)
    assert shown and json.loads(shown[1].replace("&#34;", '"')) == record.config


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    record = RunRecord(
        *(HOSTILE,) * 3,
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        loss=[1.0],
        metrics=[Metric(HOSTILE, 0.5, HOSTILE), Metric(HOSTILE, 5, HOSTILE, share=False)],
        sizes=[Size(HOSTILE, 1, 1)],
        spectra=[LayerSpectrum(HOSTILE, [2.0, 1.0], [2.5, 1.0])],
        proofs=[Proof(HOSTILE, True, HOSTILE)],
        examples=[Example(HOSTILE, HOSTILE, HOSTILE), Example(HOSTILE, HOSTILE, "x")],
        headline=HOSTILE,
    )
    tags = Tags(render(record))
    assert "script" not in tags.count and "img" not in tags.count and tags.open == []
    assert "&lt;script&gt;" in render(record)


def test_an_empty_record_is_a_page_without_empty_figures() -> None:
    page = render(RunRecord("t", "t", "svft"))
    assert "<svg" not in page and 'id="proofs"' not in page and 'id="versions"' in page


def test_a_long_list_of_examples_is_cut_and_says_so() -> None:
    page = render(replace(full_record(), examples=[Example(f"text {i}", "a", "b") for i in range(40)]))
    assert page.count("text ") - page.count("text classification") >= MOST_EXAMPLES and "text 12" not in page
    assert "first 12 of 40" in page


def test_steps_without_a_finite_loss_are_named() -> None:
    assert "1 of 2 steps had no finite loss" in render(replace(full_record(), loss=[1.0, float("nan")]))


def test_the_headline_is_the_records_own_if_it_has_one() -> None:
    assert headline(replace(full_record(), headline="It works.")) == "It works."
    assert headline(replace(full_record(), metrics=[])) == (
        "spectral_a, 300 steps, with 73,728 trained numbers in a file of 312.4 KB."
    )
    assert headline(RunRecord("t", "t", "svft", metrics=[Metric("svft", 0.5)])) == "svft: 50.0%."


def test_bytes_are_readable() -> None:
    sizes = [0, 999, 1000, 312_448, 999_999, 5 * 10**9, 2 * 10**15]
    assert [readable_bytes(s) for s in sizes] == ["0 B", "999 B", "1.0 KB", "312.4 KB", "1.0 MB", "5.0 GB", "2000.0 TB"]


def test_a_missing_jinja2_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'spectune[report]'")):
        write_report(full_record(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(full_record(), tmp_path / "file" / "report.html")

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spectune.errors import MissingExtraError, OutputError
from spectune.pages import write_report
from spectune.pages.run_page import MOST_CLASSES, MOST_EXAMPLES, headline, readable_bytes, render
from spectune.runs import Check, Confusion, Example, LayerSpectrum, Metric, Sample, Size

from .records import bare_record, full_record

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
        "test loss",
        "2.4e-7",
        "humor",
        "always shipping",
        "A parcel walks into a bar.",
        "in the data: It is on its way.",
        '<td class="n">85</td><td class="n">85.6%</td><td class="n">90.6%</td><td class="n">88.0%</td>',
    ):
        assert words in page, words
    for part in (
        "results",
        "loss",
        "figures",
        "classes",
        "samples",
        "spectra",
        "sizes",
        "checks",
        "examples",
        "configuration",
        "versions",
    ):
        assert f'id="{part}"' in page, part
    assert page.count('aria-label="holds"') == 2 and page.count('aria-label="fails"') == 1
    assert record.versions["torch"] in page and record.machine["platform"] in page
    shown = re.search(r"<pre>(.*?)</pre>", page, re.S)
    assert shown and json.loads(shown[1].replace("&#34;", '"')) == record.config


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    record = bare_record(
        title=HOSTILE,
        task=HOSTILE,
        method=HOSTILE,
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        losses=[1.0],
        metrics={HOSTILE: {"accuracy": 0.5, HOSTILE: 5.0}},
        compared=[
            Metric(name=HOSTILE, value=0.5, note=HOSTILE),
            Metric(name=HOSTILE, value=5, note=HOSTILE, share=False),
        ],
        sizes=[Size(name=HOSTILE, trainable=1, file_bytes=1)],
        spectra=[LayerSpectrum(name=HOSTILE, before=[2.0, 1.0], after=[2.5, 1.0])],
        checks=[Check(name=HOSTILE, ok=True, text=HOSTILE)],
        confusion=Confusion(split=HOSTILE, labels=[HOSTILE, "b"], counts=[[1, 0], [0, 1]]),
        samples=[Sample(prompt=HOSTILE, expected=HOSTILE, before=HOSTILE, after=HOSTILE)],
        examples=[Example(text=HOSTILE, expected=HOSTILE, predicted=name) for name in (HOSTILE, "x")],
    )
    tags = Tags(render(record))
    assert "script" not in tags.count and "img" not in tags.count and tags.open == []
    assert "&lt;script&gt;" in render(record)


def test_an_empty_record_is_a_page_without_empty_figures() -> None:
    page = render(bare_record())
    assert "<svg" not in page and 'id="checks"' not in page and 'id="versions"' in page


def test_a_run_is_compared_with_always_answering_the_largest_class() -> None:
    said = headline(full_record(compared=[]))
    assert said.startswith("test accuracy: 87.4%, against 42.5% (always shipping)")
    other = full_record(compared=[], metrics={"test": {"macro_f1": 0.8}})
    assert "always" not in headline(other)  # an accuracy says nothing about another metric


def test_many_classes_are_listed_without_a_matrix() -> None:
    names = [f"class {i}" for i in range(MOST_CLASSES + 1)]
    counts = [[int(i == j) * 1234 for j in range(len(names))] for i in range(len(names))]
    page = render(full_record(confusion=Confusion(split="test", labels=names, counts=counts)))
    assert page.count("1,234") == len(names) and "draws no table of 13 x 13 classes" in page


def test_a_long_list_of_examples_is_cut_and_says_so() -> None:
    page = render(full_record(examples=[Example(text=f"text {i}", expected="a", predicted="b") for i in range(40)]))
    assert page.count("text ") - page.count("text classification") >= MOST_EXAMPLES and "text 12" not in page
    assert "first 12 of 40" in page


def test_steps_without_a_finite_loss_are_named() -> None:
    assert "1 of 2 steps had no finite loss" in render(full_record(losses=[1.0, float("nan")]))


def test_the_headline_says_the_first_share_of_the_test_examples() -> None:
    assert headline(full_record(metrics={}, compared=[])) == (
        "spectral_a, 300 steps, with 73,728 trained numbers in a file of 312.4 KB."
    )
    both = {"validation": {"accuracy": 0.9}, "test": {"loss": 0.1, "accuracy": 0.5, "macro_f1": 0.4}}
    assert headline(bare_record(metrics=both)) == "test accuracy: 50.0%."
    assert headline(bare_record(metrics={"validation": {"accuracy": 0.9}})) == "validation accuracy: 90.0%."


def test_speed_and_memory_stand_among_the_figures() -> None:
    page = render(bare_record(step_seconds=0.25, peak_bytes=996_710_000, device="cpu"))
    assert "seconds a step" in page and "0.25" in page
    assert "peak memory" in page and "996.7 MB" in page


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

"""Null, NaN and what is not text are refused with their row: nothing is learned from the word None."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import DataError
from spectune.recipes import parse_config
from spectune.recipes.conversations import fill, prepared
from spectune.recipes.data import Row, read_rows, texts
from spectune.runs import dry_run

from . import tiny

NULLS = [None, math.nan]


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("name", ["text", "text_pair"])
def test_a_text_that_is_null(null: Any, name: str, tmp_path: Path) -> None:
    rows = [{"text": "good", "text_pair": "w1", "label": "yes"}, {"text": "bad", "text_pair": "w2", "label": "no"}]
    rows[1][name] = null
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": None, "text_pair": "text_pair"}
    with pytest.raises(DataError, match=rf"pairs.jsonl, row 2: column '{name}' is null"):
        dry_run(parse_config(tiny.text_run(tmp_path, data=data)))


def test_a_null_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 2: column 'text' is null"):
        texts(read_rows(tmp_path / "a.parquet"), "text", "train")


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize(
    ("form", "row", "templates"),
    [
        ("text", {"text": "a"}, (None, None)),
        ("text", {"q": "a"}, ("<{q}>", None)),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, (None, None)),
        ("prompt_completion", {"q": "a", "a": "b"}, ("{q}", "{a}")),
        ("alpaca", {"instruction": "a", "input": "b", "output": "c"}, (None, None)),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_every_column_of_every_form(
    form: Any, row: dict[str, Any], templates: tuple[str | None, str | None], null: Any, chat: bool
) -> None:
    for name in row:
        where = Row(row | {name: null}, "a.jsonl, row 7")
        with pytest.raises(DataError, match=rf"^a.jsonl, row 7: column '{name}' is null"):
            prepared([where], form, *templates, chat)


def test_a_column_that_a_row_lacks_is_named_with_the_row() -> None:
    rows = [Row({"instruction": "a", "output": "b"}, "a.json, row 1"), Row({"instruction": "a"}, "a.json, row 2")]
    with pytest.raises(DataError, match=r"^a.json, row 2: format alpaca needs the column 'output'"):
        prepared(rows, "alpaca", None, None, False)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_lists_and_bytes_are_no_texts(value: Any) -> None:
    with pytest.raises(DataError, match="not a text"):
        fill("{q}", {"q": value})
    with pytest.raises(DataError, match=r"^data.test, row 1: column 'q' is a"):
        texts([Row({"q": value})], "q", "test")
    assert fill("{q:.1f}", {"q": 2}) == "2.0"

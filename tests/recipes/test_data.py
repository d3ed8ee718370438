"""Examples out of files: every format gives the same rows, splits come from the seed, damage is named."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from spectune.errors import DataError
from spectune.recipes.data import column, limited, load_splits, read_rows
from spectune.recipes.run_config import DataSection

ROWS = [{"text": f'a "word", {i}\nand more', "label": str(i % 3)} for i in range(20)]


def write_all(folder: Path) -> list[Path]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.json").write_text(json.dumps(ROWS))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    for path in write_all(tmp_path):
        assert read_rows(path) == ROWS, path.name


def test_the_held_out_share_comes_from_the_seed_and_overlaps_with_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    data = DataSection(train=str(tmp_path / "a.json"), validation_share=0.25, limit={"train": 6})
    state = random.getstate()
    whole = load_splits(data, 0)
    assert len(whole["validation"]) == 5 and len(whole["train"]) == 15
    texts = [row["text"] for part in whole.values() for row in part]
    assert sorted(texts) == sorted(row["text"] for row in ROWS)
    assert load_splits(data, 0) == whole and load_splits(data, 1) != whole
    few = limited(whole, data, 0)
    assert len(few["train"]) == 6 and few["validation"] == whole["validation"]
    assert limited(whole, data, 1)["train"] != few["train"]
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b"{oh", "this is no jsonl file"),
        ("a.csv", b"a,b\n1\n", "row 2 has another number of columns"),
        ("a.json", b'{"a": 1}', "a list of rows was expected"),
        ("a.jsonl", b"[1]\n", "every row must have named columns"),
        ("a.jsonl.gz", b"not gzip", "this is no jsonl file"),
        ("a.jsonl", b"\xff\xfe", "this is no jsonl file"),
        ("a.xls", b"", "not read from .xls files"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=line):
        read_rows(tmp_path / name)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        read_rows(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="no column 'texxt'. Did you mean 'text'"):
        column(ROWS, "texxt", "train")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="no example is in it"):
        load_splits(DataSection(train=str(tmp_path / "empty.json")), 0)
    with pytest.raises(DataError, match=r"data.limit.test: asked for 3 examples of a split that is not given"):
        limited({"train": ROWS}, DataSection(limit={"test": 3}), 0)

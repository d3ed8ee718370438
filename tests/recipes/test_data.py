"""Examples out of files: every format gives the same rows, splits come from the seed, damage is named."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from spectune.errors import DataError
from spectune.recipes.data import column, held_out, limited, load_splits, read_rows
from spectune.training.config import DataSection

ROWS = [{"text": f'a "word", {i}\nand more', "label": str(i % 3)} for i in range(20)]


GZIP = gzip.compress(json.dumps(ROWS).encode(), mtime=0)


def write_all(folder: Path) -> list[Path]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.json").write_text(json.dumps(ROWS))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
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
        ("a.jsonl", b"{oh", "this is not a jsonl file"),
        ("a.csv", b"a,b\n1\n", "row 2 has 1 columns"),
        ("a.json", b'{"a": 1}', "it is not a list of rows"),
        ("a.jsonl", b"[1]\n", "this is not a row with named columns"),
        ("a.jsonl.gz", b"not gzip", "this is not a jsonl file"),
        # "Stack overflow": Python 3.14
        ("a.jsonl", b"[" * 200_000, "this is not a jsonl file: (maximum recursion depth|Stack overflow)"),
        ("a.json", b"[" * 200_000, "this is not a json file: (maximum recursion depth|Stack overflow)"),
        ("a.jsonl.gz", GZIP[:12] + b"\xff" * 8 + GZIP[20:], "this is not a jsonl file: Error -3 while decompressing"),
        ("a.jsonl.gz", GZIP[:-9], "this is not a jsonl file: Compressed file ended"),
        ("a.csv.gz", gzip.compress(b"a" * 2**25), "unpacks to more than 16,777,216 bytes"),
        ("a.jsonl", b"\xff\xfe", "this is not a jsonl file"),
        ("a.xls", b"", "cannot read rows from .xls files"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=line):
        read_rows(tmp_path / name)


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a" * 2**28))
    tracemalloc.start()
    with pytest.raises(DataError, match="pass it unpacked"):
        read_rows(tmp_path / "a.csv.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path) -> None:
    prompt = " ".join(str(i) for i in range(200))
    rows = [{"prompt": prompt, "answer": random.Random(i).random()} for i in range(30_000)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert len(packed) * 20 < 30_000 * len(prompt) > 2**24
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert read_rows(tmp_path / "a.jsonl.gz") == rows


def test_letters_that_look_like_ends_of_lines_end_no_row(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\x85three\x0cfour", "label": "1"}, {"text": "five", "label": "2"}]
    lines = "".join(f"{row['text']},{row['label']}\r\n" for row in rows)
    (tmp_path / "a.csv").write_bytes(f"text,label\r\n{lines}".encode())
    assert read_rows(tmp_path / "a.csv") == rows


def test_what_pyarrow_cannot_do_is_one_line_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"t": pyarrow.array([2**40], pyarrow.timestamp("s"))}), path)
    with pytest.raises(DataError, match="this is not a parquet file: date value out of range"):
        read_rows(path)
    parquet.write_table(pyarrow.table({"t": ["x" * 2**20] * 100}), path)  # a dictionary of one entry
    with pytest.raises(DataError, match="this is not a parquet file: it unpacks to more than"):
        read_rows(path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_rows(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="no column 'texxt'. Did you mean 'text'"):
        column(ROWS, "texxt", "train")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="contains no examples"):
        load_splits(DataSection(train=str(tmp_path / "empty.json")), 0)
    with pytest.raises(DataError, match=r"data.limit.test=3: this split is not given"):
        limited({"train": ROWS}, DataSection(limit={"test": 3}), 0)


def test_a_share_is_not_held_out_beside_examples_that_came_with_the_data() -> None:
    data = DataSection(train="a", validation_share=0.5)
    with pytest.raises(DataError, match=r"data\.validation_share: the data already contain validation examples"):
        held_out({"train": [1, 2], "validation": [3]}, data, seed=0)


QUOTED = [
    '"Yes," he said.\tA man speaks.\tentailment',
    'He said "no\tA "man" speaks."\tnot_entailment',
    '"\t"\tentailment',
    '"open\tshut"\tnot_entailment',
    'plain\t""\tentailment',
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_of_a_tsv_are_letters(end: str, tmp_path: Path) -> None:
    lines = [f"{i}\t{line}" for i, line in enumerate(QUOTED)]
    (tmp_path / "a.tsv").write_bytes(end.join(["index\tsentence1\tsentence2\tlabel", *lines, ""]).encode())
    found = read_rows(tmp_path / "a.tsv")
    assert ["\t".join([row["sentence1"], row["sentence2"], row["label"]]) for row in found] == QUOTED
    assert found[4].where.endswith("a.tsv, row 6")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz"])
def test_a_mark_at_the_beginning_of_a_file_is_no_letter(name: str, tmp_path: Path) -> None:
    text = {"csv": "a\n1\n", "tsv": "a\n1\n", "jsonl": '{"a": "1"}\n', "json": '[{"a": "1"}]'}[name.split(".")[1]]
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_rows(tmp_path / name) == [{"a": "1"}]


def test_fields_of_a_table_may_be_long(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"text{mark}label\n{'x' * 200_000}{mark}1\n")
        assert len(read_rows(tmp_path / name)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_that_do_not_add_up_are_refused(name: str, tmp_path: Path) -> None:
    mark = "," if name == "a.csv" else "\t"
    (tmp_path / name).write_text(f"a{mark}b{mark}a\n1{mark}2{mark}3\n")
    with pytest.raises(DataError, match="the column 'a' occurs twice in the first row"):
        read_rows(tmp_path / name)
    (tmp_path / name).write_text(f"a{mark}b\n\n1{mark}2\n1\n")
    with pytest.raises(DataError, match=r"row 4 has 1 columns, but the first row has 2"):
        read_rows(tmp_path / name)


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl, row {number}" for number in (1, 3)
    ]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(DataError, match="this is not a jsonl file: row 3: Expecting"):
        read_rows(tmp_path / "a.jsonl")

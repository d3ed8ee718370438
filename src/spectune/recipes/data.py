"""Examples from files (CSV, TSV, JSONL, Parquet, also gzipped) or the Hugging Face hub; splits by the seed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingExtraError, nearest, one_line
from ..training.config import SPLITS, DataSection


class Row(dict[str, Any]):
    """The columns of one example, and its place: `train.csv, row 7` (a table's header is row 1)."""

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str = "") -> None:
        super().__init__(columns)
        self.where = where


Numbered = Iterable[tuple[int, Any]]
# A small file may unpack to gigabytes. Deflate writes at most 1,032 equal bytes as one; text reaches 3 to 30, rows that
# repeat a prompt about 100; more is not real data. Any file may unpack to 16 MiB. Chosen.
MOST_UNFOLDING, FREE_BYTES = 200, 2**24
# Bytes that are unpacked at a time. Chosen.
PIECE_BYTES, PIECE_ROWS = 2**20, 1_000


def load_splits(data: DataSection, seed: int) -> dict[str, list[Row]]:
    """Get all rows of each configured split; train always exists, validation if it is held out.

    The held-out share is drawn by the seed, without touching the global random state. `DataError` for a file that
    is missing or not in its format.
    """
    named = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
    if "train" not in named:
        raise DataError("data.train: is missing. Give a file, or a split of data.hub.")
    return held_out({s: _from_hub(data, n) if data.hub else read_rows(n) for s, n in named.items()}, data, seed)


def held_out(rows: Mapping[str, Sequence[Any]], data: DataSection, seed: int) -> dict[str, list[Any]]:
    """Get the splits, with `data.validation_share` of train moved to validation."""
    found = {split: list(part) for split, part in rows.items()}
    if data.validation_share is not None:
        if "validation" in found:
            raise DataError("data.validation_share: the data already contain validation examples. Leave it out.")
        everything = found["train"]
        order = _shuffled(range(len(everything)), seed)
        kept_back = set(order[: max(1, round(data.validation_share * len(order)))])
        found["validation"] = [everything[i] for i in sorted(kept_back)]
        found["train"] = [row for i, row in enumerate(everything) if i not in kept_back]
    empty = [split for split, part in found.items() if not part]
    if empty:
        raise DataError(f"data.{empty[0]}: contains no examples. Choose another file.")
    return found


def limited(rows: Mapping[str, Sequence[Any]], data: DataSection, seed: int) -> dict[str, list[Any]]:
    """Get at most `data.limit` examples of each split, drawn by the seed."""
    found = {split: list(part) for split, part in rows.items()}
    for split, limit in data.limit.items():
        if split not in found:
            raise DataError(f"data.limit.{split}={limit}: this split is not given. Give it, or leave the limit out.")
        found[split] = [found[split][i] for i in _shuffled(range(len(found[split])), seed)[:limit]]
    return found


def _shuffled(places: Iterable[int], seed: int) -> list[int]:
    order = list(places)
    random.Random(seed).shuffle(order)
    return order


def read_rows(path: str | Path) -> list[Row]:
    """Get the rows of one file, by its ending: .csv .tsv .jsonl .json .parquet; all but parquet also with .gz."""
    path = Path(path)
    if not path.is_file():
        why = "this is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: a data file is needed, but {why}. Check the path.")
    ending = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    readers = {"csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "json": _json, "parquet": _parquet}
    if ending not in readers:
        raise DataError(f"{path}: cannot read rows from .{ending} files. Choose from: {', '.join(readers)}.")
    try:
        rows = list(readers[ending](path))
    except (ValueError, OSError, csv.Error, EOFError, zlib.error, RecursionError) as error:
        raise DataError(f"{path}: this is not a {ending} file: {one_line(error)}.") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: this is not a row with named columns: {str(row)[:40]!r}.")
    return [Row(row, f"{path}, row {number}") for number, row in rows]


def _text(path: Path) -> str:
    if not path.name.endswith(".gz"):
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte order mark
    pieces, size, most = [], 0, _most_bytes(path)
    with gzip.open(path) as file:
        while piece := file.read(PIECE_BYTES):
            pieces.append(piece)
            size += len(piece)
            _refuse_bomb(size, most)
    return b"".join(pieces).decode("utf-8-sig")


def _most_bytes(path: Path) -> int:
    return max(FREE_BYTES, MOST_UNFOLDING * path.stat().st_size)


def _refuse_bomb(size: int, most: int) -> None:
    if size > most:
        raise ValueError(
            f"it unpacks to more than {most:,} bytes (the limit is {MOST_UNFOLDING} times its size, at least "
            f"{FREE_BYTES:,}). Check it, or pass it unpacked"
        )


def _csv(path: Path) -> Numbered:
    text = _text(path)
    before = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 letters by default
    try:
        return _table(list(csv.reader(io.StringIO(text, newline=""), strict=True)))
    finally:
        csv.field_size_limit(before)


def _tsv(path: Path) -> Numbered:
    """Split at every tab and line end: quotes are plain letters, as in GLUE's files."""
    lines = [line.removesuffix("\r") for line in _text(path).split("\n")]
    return _table([line.split("\t") if line else [] for line in lines])


def _table(lines: list[list[str]]) -> Numbered:
    """Get the rows below the header with their numbers (the header is row 1), without empty ones."""
    header = next(iter(lines), [])
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} occurs twice in the first row")
    found = [(number, line) for number, line in enumerate(lines, 1) if line and number > 1]
    for number, line in found:
        if len(line) != len(header):
            raise ValueError(f"row {number} has {len(line)} columns, but the first row has {len(header)}")
    return [(number, dict(zip(header, line, strict=True))) for number, line in found]


def _jsonl(path: Path) -> Numbered:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"row {number}: {error.msg}") from error


def _json(path: Path) -> Numbered:
    read = json.loads(_text(path))
    if not isinstance(read, list):
        raise ValueError("it is not a list of rows")
    return enumerate(read, 1)


def _parquet(path: Path) -> Numbered:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError(f"{path}: reading it needs pyarrow. Run: pip install 'spectune[train]'") from None
    rows: list[dict[str, Any]] = []
    size, most = 0, _most_bytes(path)
    try:
        with parquet.ParquetFile(path) as file:
            for piece in file.iter_batches(PIECE_ROWS):
                size += piece.nbytes
                _refuse_bomb(size, most)
                rows += piece.to_pylist()
    except Exception as error:  # pyarrow raises many kinds, such as OverflowError for a date
        raise ValueError(str(error) or type(error).__name__) from error
    return enumerate(rows, 1)


def hub_split(data: DataSection, split: str) -> Any:
    """Get one split of a hub data set from `datasets`; code of the data set is never run."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"data.hub={data.hub}: this needs the package datasets. Run: pip install 'spectune[train]'"
        ) from None
    try:
        return datasets.load_dataset(data.hub, data.hub_config, split=split)
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"data.hub={data.hub}, split {split!r}: {one_line(error)}.") from error


def _from_hub(data: DataSection, split: str) -> list[Row]:
    found = hub_split(data, split)
    rows: list[dict[str, Any]] = found.to_list()
    # Classes stay numbers: their order is the task's (F1 is of class 1). In a test set, -1 means a hidden label.
    labels = [name for name, feature in found.features.items() if hasattr(feature, "int2str")]
    return [
        Row(row | {name: None for name in labels if row[name] == -1}, f"{data.hub}, {split}, row {number}")
        for number, row in enumerate(rows, 1)
    ]


def place(row: Mapping[str, Any], split: str, position: int) -> str:
    """Get a row's place for an error message: its file and row, else its split and position."""
    return getattr(row, "where", "") or f"data.{split}, row {position + 1}"


def each(
    rows: Sequence[Mapping[str, Any]], split: str, form: str, read: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> list[Row]:
    """Get every row as `read` makes it; `DataError` gives file and row, and the column that `form` needs."""
    found = []
    for i, row in enumerate(rows):
        where = place(row, split, i)
        try:
            found.append(Row(read(row), where))
        except KeyError as error:
            name = str(error.args[0])
            raise DataError(f"{where}: {form} needs the column {name!r}. {nearest(name, list(row))}") from None
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    return found


def is_missing(value: Any) -> bool:
    """Ask whether a cell is null, or NaN as pandas and JSON write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def filled(value: Any, name: str) -> Any:
    """Get a cell as text; `DataError` for null, lists and bytes."""
    if is_missing(value):
        raise DataError(f"column {name!r} is null. Fill it in, or remove the row.")
    if isinstance(value, (list, tuple, dict, bytes)):
        raise DataError(f"column {name!r} is a {type(value).__name__}, not a text: {str(value)[:40]!r}.")
    return value


def texts(rows: Sequence[Row], name: str, split: str) -> list[str]:
    """Get one column as texts; `DataError` names the first row without one."""
    found = []
    for position, value in enumerate(column(rows, name, split)):
        try:
            found.append(str(filled(value, name)))
        except DataError as error:
            raise DataError(f"{place(rows[position], split, position)}: {error}") from None
    return found


def column(rows: Sequence[Row], name: str, split: str) -> list[Any]:
    """Get one column; `DataError` with the near misses if a row lacks it."""
    for position, row in enumerate(rows):
        if name not in row:
            raise DataError(f"{place(row, split, position)}: no column {name!r}. {nearest(name, list(row))}")
    return [row[name] for row in rows]

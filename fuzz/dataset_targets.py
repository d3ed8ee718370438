"""Data files that a recipe reads: text tables, JSON, what is packed by gzip, and Parquet."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from functools import partial

from target import PLACE, Target

from spectune.recipes.data import read_rows

ROWS = [{"text": f'a "word", {i}\nand more', "label": i % 3, "more": None if i else "ü"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'text,label\n"a ""word"", 1\nand more",0\nplain,1\n'
# 32 MiB of one letter in 32 KiB: more than is free, and more than a file may unfold to.
BOMB = gzip.compress(b"a" * 2**25, mtime=0)


def read(ending: str, data: bytes) -> None:
    path = PLACE / f"rows.{ending}"
    path.write_bytes(data)
    read_rows(path)


def packed(ending: str, data: bytes) -> None:
    """The input is what gzip packed, so that mutations reach what stands behind its checksum."""
    read(f"{ending}.gz", gzip.compress(data, 1, mtime=0))


def parquet_bytes(**options: object) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    nested = [row | {"list": [1, 2], "object": {"a": b"\0", "b": 0.5}} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(nested), file, **options)
    return file.getvalue()


def parquet_part(part: str, data: bytes) -> None:
    """The input is the footer, or the pages before it, of a file that is whole otherwise."""
    pages, footer = parquet_parts(PARQUET)
    if part == "footer":
        footer = data
    else:
        pages = data[: len(pages)].ljust(len(pages), b"\0")
    read("parquet", pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def parquet_parts(data: bytes) -> tuple[bytes, bytes]:
    end = len(data) - 8
    start = end - int.from_bytes(data[end : end + 4], "little")
    return data[:start], data[start:end]


PARQUET = parquet_bytes()


def dataset_targets() -> list[Target]:
    texts: dict[str, tuple[bytes, ...]] = {
        "csv": (CSV, b"text\n" * 3),
        "tsv": (CSV.replace(b",", b"\t"),),
        "json": (json.dumps(ROWS).encode(), b"[]"),
        "jsonl": (LINES, LINES.split(b"\n")[0]),
    }
    doors: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
        **{ending: (partial(read, ending), seeds) for ending, seeds in texts.items()},
        "gz": (partial(read, "jsonl.gz"), (gzip.compress(LINES, mtime=0), gzip.compress(LINES, mtime=0) * 2, BOMB)),
        "gz_inside": (partial(packed, "csv"), texts["csv"]),
        "parquet": (
            partial(read, "parquet"),
            (
                PARQUET,
                parquet_bytes(compression="zstd", data_page_version="2.0"),
                parquet_bytes(compression="none", use_dictionary=False),
            ),
        ),
        "parquet_footer": (partial(parquet_part, "footer"), (parquet_parts(PARQUET)[1],)),
        "parquet_pages": (partial(parquet_part, "pages"), (parquet_parts(PARQUET)[0],)),
    }
    return [Target(f"data_{name}", run, seeds) for name, (run, seeds) in doors.items()]

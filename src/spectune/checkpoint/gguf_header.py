"""Check the header of a GGUF file: every count must fit into the bytes of the file.

gguf's own reader trusts the counts: an array of 2^60 entries in a file of a hundred bytes keeps it busy for years.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterError

MAGIC = b"GGUF"
# Bytes of the scalar kinds, by their number in the format (ggml/docs/gguf.md); 8 is a string, 9 an array.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# gguf builds an object for each entry of an array, twenty microseconds each. The largest vocabularies have 262,144
# words in three arrays. Chosen.
MOST_ENTRIES = 4_000_000
# ggml's own GGML_MAX_DIMS.
MOST_SIDES = 4


def check_gguf_header(path: Path) -> int:
    """Get the number of tensors; `AdapterError` for a header that promises more than the file contains.

    Takes time and memory in proportion to the header, and reads no tensor.
    """
    try:
        with path.open("rb") as file:
            return _Walk(file, path.stat().st_size).run()
    except OSError as error:
        raise AdapterError(f"{path}: cannot read the file: {error.strerror}. Check its permissions.") from error
    except ValueError as error:
        raise AdapterError(f"{path}: transformers cannot read this GGUF file: {error}. Copy it again.") from error


class _Walk:
    """One pass over the header; `ValueError` if it contradicts itself."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.order, self.entries = file, size, "<", 0

    def run(self) -> int:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.take(4)
        self.order = ">" if version[:2] == b"\0\0" else "<"
        tensors, keys = self.integer(8), self.integer(8)
        self.expect(tensors, 24)
        self.expect(keys, 13)
        for _ in range(keys):
            self.string()
            self.value(self.integer(4))
        for _ in range(tensors):
            self.string()
            sides = self.integer(4)
            if sides > MOST_SIDES:
                raise ValueError(f"a tensor has {sides} sides")
            self.take(8 * sides + 4 + 8)
        return tensors

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("its header is incomplete, or promises more than the file contains")
        self.left -= count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left:
            raise ValueError("its header promises more than the file contains")
        self.left -= count
        self.file.seek(count, 1)

    def integer(self, size: int) -> int:
        number: int = struct.unpack(self.order + {4: "I", 8: "Q"}[size], self.take(size))[0]
        return number

    def expect(self, count: int, least: int) -> None:
        """Refuse a count of entries that take at least `least` bytes each."""
        if count * least > self.left:
            raise ValueError(f"it promises {count:,} entries, more than the file can contain")
        self.entries += count
        if self.entries > MOST_ENTRIES:
            raise ValueError(f"its header has more than {MOST_ENTRIES:,} entries")

    def string(self) -> None:
        self.skip(self.integer(8))

    def value(self, kind: int) -> None:
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == STRING:
            self.string()
        elif kind == ARRAY:
            self.array()
        else:
            raise ValueError(f"it has a value of the unknown kind {kind}")

    def array(self) -> None:
        kind, count = self.integer(4), self.integer(8)
        if kind == ARRAY:
            raise ValueError("it has an array of arrays")
        self.expect(count, SCALARS.get(kind, 8))
        if kind in SCALARS:
            self.skip(count * SCALARS[kind])
            return
        for _ in range(count):
            self.value(kind)

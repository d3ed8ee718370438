"""The header of a safetensors file: parsed once, checked against the file's size, as plain tables."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import torch

from ..errors import AdapterError

# The limit of the safetensors format itself (its README, "Format").
HEADER_LIMIT = 100_000_000
# Names are paths of modules; the longest of transformers' and diffusers' are about 120 letters. Chosen.
NAME_LIMIT = 500
# torch takes 64 dimensions at most. Without a limit the product of a million long sides takes minutes.
MOST_SIDES = 64
# The limit of file systems; a longer side or a larger product is nonsense.
LARGEST = 2**63
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Headers of at least this many bytes are remembered: parsing 100 MB takes seconds, and files are opened several times.
# Chosen: adapters are below it, large models above.
LONG_HEADER = 2**18
MOST_RECENT = 4

Parsed: TypeAlias = tuple[
    dict[str, str], dict[str, tuple[int, ...]], dict[str, torch.dtype], dict[str, tuple[int, int]]
]
# Keyed by the header's bytes, so that a rewritten file is parsed again.
RECENT: dict[tuple[bytes, int], Parsed] = {}


class Header(NamedTuple):
    """A parsed header; the tables may be shared and must not be changed."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    places: dict[str, tuple[int, int]]
    """Name -> first byte in the file, and number of bytes."""
    stamp: tuple[int, ...]


def read_header(path: Path) -> Header:
    """Get the header, where the tensors begin, and a stamp of the file's state."""
    # os.path, unlike pathlib, treats an impossible name as a missing file.
    if not os.path.isfile(path):
        why = "this is not a regular file" if os.path.exists(path) else "there is no such file"
        raise AdapterError(f"{path}: a safetensors file is needed, but {why}. Check the path.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            now = stamp(file)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, size, start, length)
            text = file.read(length)
    except OSError as error:
        raise AdapterError(f"{path}: cannot read the file: {error.strerror}. Check its permissions.") from error
    return _remembered(path, size, text, now)


def _remembered(path: Path, size: int, text: bytes, now: tuple[int, ...]) -> Header:
    """Get the parsed header; a long one is parsed only once."""
    if len(text) < LONG_HEADER:
        return Header(*_parsed(path, size, text), now)
    key = (hashlib.blake2b(text).digest(), size)
    parsed = RECENT.pop(key, None) or _parsed(path, size, text)
    RECENT[key] = parsed
    for old in list(RECENT)[:-MOST_RECENT]:
        RECENT.pop(old, None)
    return Header(*parsed, now)


def _parsed(path: Path, size: int, text: bytes) -> Parsed:
    """Parse and check a header, with garbage collection off: it would visit every new object again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
        promised = 8 + len(text) + _bytes_of_tensors(header, size)
        if size < promised:
            raise AdapterError(_cut_short(path, size, f"but its header promises {promised:,}"))
        _check_dtypes(path, header)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        dtypes = {name: DTYPES[entry["dtype"]] for name, entry in header.items()}
        return metadata, shapes, dtypes, {name: _place(entry, 8 + len(text)) for name, entry in header.items()}
    except AdapterError:
        raise
    except _UnreadableNameError:
        raise AdapterError(
            f"{path}: the name of a tensor is too long or has control characters, so the file is not read. Rename it."
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterError(foreign(path, size)) from error
    finally:
        if collecting:
            gc.enable()


class _UnreadableNameError(ValueError):
    """A tensor's name is not what a terminal or a table can show."""


def _place(entry: dict[str, Any], start: int) -> tuple[int, int]:
    first, stop = entry["data_offsets"]
    return start + first, stop - first


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Get a JSON object; ValueError for a duplicate key, which parsers resolve differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a duplicate key")
    return found


def stamp(file: IO[bytes]) -> tuple[int, ...]:
    """Get values that change when a file is replaced or cut."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_ino  # not the time: a cache touches its entries when it serves them


def _check_start(path: Path, size: int, start: bytes, length: int) -> None:
    if start == b"version ":
        raise AdapterError(f"{path}: this is only a Git LFS pointer to the file. Run: git lfs pull")
    if len(start) < 8 or length > HEADER_LIMIT:
        raise AdapterError(foreign(path, size))
    if 8 + length > size:
        raise AdapterError(_cut_short(path, size, f"but its header alone would be {length:,}"))


def _bytes_of_tensors(header: Any, size: int) -> int:
    """Get where the last tensor ends; `ValueError`, or what a wrong type raises, for nonsense."""
    end = 0
    _check_metadata(header.get("__metadata__", {}))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        sides = entry["shape"]
        if not isinstance(sides, list) or len(sides) > MOST_SIDES:
            raise ValueError("not a list of sides, or too many of them")
        if any(type(number) is not int for number in (start, stop, *sides)):
            raise ValueError("an offset or a side is not an integer")
        if min([start, *sides]) < 0 or max([start, stop, *sides]) > LARGEST:
            raise ValueError("a negative or an absurd offset or side")
        # The sides of an empty tensor have no bytes behind them; allocating by one would never end.
        if 0 in sides and max(sides) > size:
            raise ValueError("an empty tensor has a side longer than the file")
        if len(name) > NAME_LIMIT or not name.isprintable():
            raise _UnreadableNameError
        known = DTYPES.get(entry["dtype"])
        if known is not None and stop - start != math.prod(sides) * known.itemsize:
            raise ValueError("shape and offsets disagree")
        end = max(end, stop)
    return end


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are not text")


def _check_dtypes(path: Path, header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] not in DTYPES:
            raise AdapterError(
                f"{path}: the tensor {name!r} is stored as {entry['dtype']}, which spectune does not read. "
                f"Save it in another dtype."
            )


def _cut_short(path: Path, size: int, promise: str) -> str:
    return f"{path}: the file has {size:,} bytes, {promise}. Copy it again."


def foreign(path: Path, size: int) -> str:
    """Get the message for a file that is not safetensors."""
    return f"{path}: this file of {size:,} bytes is not a safetensors file. Check the path, or copy it again."

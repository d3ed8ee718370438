"""One safetensors file, read lazily: the header is checked on opening, the tensors wait on the disk."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, nearest

# The limit of the safetensors format itself (its README, "Format").
HEADER_LIMIT = 100_000_000
# Names are paths of modules; the longest of transformers' and diffusers' are about 120 letters. Chosen.
NAME_LIMIT = 500
# torch takes 64 dimensions at most. Without a limit the product of a million long sides takes minutes.
MOST_SIDES = 64
# Of what a file system addresses: 2^63. A longer side or a larger product stands for nothing.
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


@dataclass(frozen=True)
class TensorFile:
    """What one safetensors file holds; its tensors are read when asked for."""

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Get a file by its header alone; `AdapterError` when it is missing, cut short, or no safetensors."""
        path = Path(path)
        header = _read_header(path)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return cls(path, shapes, {name: DTYPES[entry["dtype"]] for name, entry in header.items()}, metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(sorted(self.shapes))

    def refuse_foreign(self) -> None:
        """Raise `AdapterError` for what safetensors itself would not read: its JSON is stricter, and it wants no hole.

        For files that PEFT and transformers will open after us; nothing but the header is read.
        """
        try:
            with safe_open(str(self.path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise AdapterError(_foreign(self.path, self.path.stat().st_size)) from error

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor; `AdapterError` with the near misses where there is none of that name."""
        if name not in self.shapes:
            raise AdapterError(f"{self.path}: asked for the tensor {name!r}. {nearest(name, self.names)}")
        try:
            with safe_open(str(self.path), framework="pt", device=str(device)) as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
            # RuntimeError: the file is gone. The others: numbers beyond what torch can address.
            raise AdapterError(
                f"{self.path}: the tensor {name!r} cannot be read: {error}. Copy the file again."
            ) from error
        if tuple(tensor.shape) != self.shapes[name] or tensor.dtype != self.dtypes[name]:
            raise AdapterError(
                f"{self.path}: the tensor {name!r} is not what the header said: its keys stand twice, or the file was "
                f"exchanged. Copy the file again."
            )
        return tensor


def _read_header(path: Path) -> dict[str, Any]:
    # os.path, unlike pathlib, takes a name that no disk can hold for a file that is not there.
    if not os.path.isfile(path):
        found = "found something else" if os.path.exists(path) else "there is no such file"
        raise AdapterError(f"{path}: asked for a safetensors file, {found}. Check the path.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, size, start, length)
            header = json.loads(file.read(length))
        promised = 8 + length + _bytes_of_tensors(header, size)
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"{path}: the file cannot be read: {error.strerror}. Check its permissions.") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterError(_foreign(path, size)) from error
    if size < promised:
        raise AdapterError(_cut_short(path, size, f"its header promises {promised:,}"))
    _check_dtypes(path, header)
    return header  # type: ignore[no-any-return]


def _check_start(path: Path, size: int, start: bytes, length: int) -> None:
    if start == b"version ":
        raise AdapterError(f"{path}: this is a Git LFS pointer and not the file itself. Run: git lfs pull")
    if len(start) < 8 or length > HEADER_LIMIT:
        raise AdapterError(_foreign(path, size))
    if 8 + length > size:
        raise AdapterError(_cut_short(path, size, f"its header alone would be {length:,}"))


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
            raise ValueError("no list of sides, or more than there are dimensions")
        if any(type(number) is not int for number in (start, stop, *sides)):
            raise ValueError("an offset or a side is no integer")
        if min([start, *sides]) < 0 or max([start, stop, *sides]) > LARGEST:
            raise ValueError("a negative or an absurd offset or side")
        # No byte stands behind a side of an empty tensor, and who counts by it would allocate without end.
        if 0 in sides and max(sides) > size:
            raise ValueError("an empty tensor has a side longer than the file")
        if len(name) > NAME_LIMIT or not name.isprintable():
            raise ValueError("a name is no name")
        known = DTYPES.get(entry["dtype"])
        if known is not None and stop - start != math.prod(sides) * known.itemsize:
            raise ValueError("shape and offsets disagree")
        end = max(end, stop)
    return end


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are no texts")


def _check_dtypes(path: Path, header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] not in DTYPES:
            raise AdapterError(
                f"{path}: the tensor {name!r} is stored as {entry['dtype']}, which is not read here. "
                f"Save it in another dtype."
            )


def _cut_short(path: Path, size: int, promise: str) -> str:
    return f"{path}: the file is {size:,} bytes, {promise}. Copy it again."


def _foreign(path: Path, size: int) -> str:
    return f"{path}: {size:,} bytes that are no safetensors file. Check the path, or copy it again."

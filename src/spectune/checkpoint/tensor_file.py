"""One safetensors file, read lazily: the header is checked on opening, the tensors wait on the disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, nearest

# The limit of the safetensors format itself (its README, "Format").
HEADER_LIMIT = 100_000_000
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

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor; `AdapterError` with the near misses where there is none of that name."""
        if name not in self.shapes:
            raise AdapterError(f"{self.path}: asked for the tensor {name!r}. {nearest(name, self.names)}")
        try:
            with safe_open(str(self.path), framework="pt", device=str(device)) as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{self.path}: the tensor {name!r} cannot be read: {error}. Copy the file again."
            ) from error


def _read_header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = "found something else" if path.exists() else "there is no such file"
        raise AdapterError(f"{path}: asked for a safetensors file, {found}. Check the path.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, size, start, length)
            header = json.loads(file.read(length))
        promised = 8 + length + _bytes_of_tensors(header)
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"{path}: the file cannot be read: {error.strerror}. Check its permissions.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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


def _bytes_of_tensors(header: Any) -> int:
    """Get where the last tensor ends; `ValueError`, or what a wrong type raises, for nonsense."""
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        sides = entry["shape"]
        if min([start, *sides]) < 0:
            raise ValueError("negative offset or side")
        known = DTYPES.get(entry["dtype"])
        if known is not None and stop - start != math.prod(sides) * known.itemsize:
            raise ValueError("shape and offsets disagree")
        end = max(end, stop)
    return end


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

"""One safetensors file, read lazily: the header is checked on opening, the tensors stay on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, nearest, one_line
from .tensor_header import DTYPES as DTYPES
from .tensor_header import HEADER_LIMIT as HEADER_LIMIT
from .tensor_header import foreign, read_header, stamp


@dataclass(frozen=True)
class TensorFile:
    """The contents of one safetensors file; each tensor is read when it is needed."""

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    _places: dict[str, tuple[int, int]] = field(repr=False)
    """Name -> first byte in the file, and number of bytes."""
    _stamp: tuple[int, ...] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Read the header; `AdapterError` if the file is missing, cut short, or not safetensors."""
        path = Path(path)
        header = read_header(path)
        return cls(path, header.shapes, header.dtypes, header.metadata, header.places, header.stamp)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(sorted(self.shapes))

    def refuse_foreign(self) -> None:
        """Raise `AdapterError` if safetensors itself would not read it: its JSON is stricter, and gaps are errors.

        For files that PEFT and transformers will open after us; only the header is read.
        """
        try:
            with safe_open(str(self.path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise AdapterError(foreign(self.path, self.path.stat().st_size)) from error

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor; `AdapterError` names similar tensors if this one is missing.

        Uses the header as it was on opening: safetensors would parse it again for every tensor. Nothing is mapped into
        memory, so a file that is cut short meanwhile is an error and not a crash.
        """
        if name not in self.shapes:
            raise AdapterError(f"{self.path}: the tensor {name!r} does not exist. {nearest(name, self.names)}")
        self._refuse_overlaps()
        try:
            data = self._bytes(name)
            flat = torch.frombuffer(data, dtype=self.dtypes[name]) if data else torch.empty(0, dtype=self.dtypes[name])
            return flat.reshape(self.shapes[name]).to(device)
        except (OSError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
            # All but OSError: numbers beyond what torch can address.
            raise AdapterError(
                f"{self.path}: cannot read the tensor {name!r}: {one_line(error)}. Copy the file again."
            ) from error

    def _bytes(self, name: str) -> bytearray:
        first, count = self._places[name]
        with self.path.open("rb") as file:
            if stamp(file) != self._stamp:
                raise OSError("the file has changed since it was opened")
            data = bytearray(count)
            file.seek(first)
            if file.readinto(data) != count:
                raise OSError("the file ends before the tensor does")
        return data

    @cached_property
    def _overlaps(self) -> bool:
        """Whether two tensors share bytes: a small file could otherwise contain any number of large tensors."""
        end = 0
        for first, count in sorted(self._places.values()):
            if count and first < end:
                return True
            end = max(end, first + count)
        return False

    def _refuse_overlaps(self) -> None:
        if self._overlaps:
            raise AdapterError(foreign(self.path, self._stamp[0]))

"""`Target`: one door that is fuzzed, and what the doors share: a place for files, and bytes to write there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# On memory-backed disk where there is one: thousands of small files are written each second.
SHARED_MEMORY = Path("/dev/shm")
PLACE = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))


@dataclass(frozen=True)
class Target:
    """One door: `run` takes the bytes of one input, `seeds` are valid ones to start from."""

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    seconds: float = 2.0
    """Longest time that one input may take; a shared machine is allowed for."""


def tensor_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata)


def folder(name: str, **files: bytes) -> Path:
    """Get a folder with these files; a double underscore in a name is a point."""
    place = PLACE / name
    place.mkdir(exist_ok=True)
    for file, content in files.items():
        (place / file.replace("__", ".")).write_bytes(content)
    return place


def spectral_config(**options: Any) -> bytes:
    return json.dumps(
        {"peft_type": "SPECTUNE", "method": "spectral_a", "r": 2, "format_version": 1, **options}
    ).encode()


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]

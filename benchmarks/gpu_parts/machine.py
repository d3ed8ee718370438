"""What the figures were measured on: versions, card, driver, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from .notebook import read, write

PACKAGES = ("torch", "peft", "transformers", "accelerate", "triton", "safetensors", "numpy", "scipy")
# A record holds figures of one of each.
SAME = ("commit", "device", "card", "versions", "tiny")


class OtherMachineError(ValueError):
    """The record was begun elsewhere."""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine(device: str, tiny: bool) -> dict[str, Any]:
    """Get the head of the record."""
    versions = {name: version(name) for name in PACKAGES} | {"torch": torch.__version__}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    head: dict[str, Any] = {**provenance(), "device": device.partition(":")[0], "tiny": tiny}
    head |= {"card": None, "memory_gib": None, "versions": versions, "threads": torch.get_num_threads()}
    if head["device"] == "cuda":
        card = torch.cuda.get_device_properties(device)
        head |= {"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        head["capability"] = f"{card.major}.{card.minor}"
        versions["driver"] = driver()
    return head


def agree(path: Path, device: str, tiny: bool) -> None:
    """Write the head into a record that has none; raise where it has that of another machine or commit."""
    record, head = read(path), machine(device, tiny)
    if "commit" not in record:
        write(path, {**head, **record})
        return
    for key in SAME:
        if record[key] != head[key]:
            raise OtherMachineError(
                f"{path}: asked to add figures with {key} {head[key]!r}, the record was begun with {record[key]!r}. "
                f"Name another --output."
            )

"""`spectune env`: what to paste into a bug report."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

PACKAGES = (
    "spectune", "torch", "peft", "transformers", "accelerate", "safetensors", "numpy", "diffusers", "bitsandbytes",
    "torchao", "trl", "datasets",
)  # fmt: skip


def env(as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False) -> None:
    """Print versions and devices, for bug reports."""
    from .terminal import say

    found = {"python": sys.version.split()[0], "system": platform.platform(), "cpus": str(os.cpu_count())}
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    found |= _devices()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        say("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda": ", ".join(gpus) or "none", "threads": str(torch.get_num_threads())}

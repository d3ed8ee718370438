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
    if note := _note():
        found["note"] = note
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


def _note() -> str | None:
    """Get a warning if the installed transformers refuses the installed PEFT: then its `add_adapter` raises."""
    from packaging.version import Version
    from transformers.integrations import peft as integration

    needed, installed = str(getattr(integration, "MIN_PEFT_VERSION", "0")), _version("peft")
    if installed is None or Version(installed) >= Version(needed):
        return None
    return (
        f"transformers {_version('transformers')} needs peft {needed} or newer for its own add_adapter and "
        f"load_adapter, but {installed} is installed. Upgrade peft or downgrade transformers."
    )


def _devices() -> dict[str, str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda": ", ".join(gpus) or "none", "threads": str(torch.get_num_threads())}

"""Where a result comes from: commit and machine, for every results file."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# A copy of the project that travels without its history names its commit here (gpu_folder.sh writes it).
COMMIT = Path(__file__).parent / "COMMIT"


def provenance() -> dict[str, Any]:
    """Get the commit of the tree (marked when it has changes) and the machine."""
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "system": platform.platform(), "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"commit": commit(), "machine": machine}


def commit() -> str:
    """Get the commit: from the file COMMIT or from git; without either, the version of the package."""
    if COMMIT.exists():
        return COMMIT.read_text().strip()
    words = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(words, capture_output=True, text=True, cwd=COMMIT.parent).stdout.strip()
    except FileNotFoundError:  # no git
        described = ""
    return described or f"spectune {version('spectune')}, without its history"

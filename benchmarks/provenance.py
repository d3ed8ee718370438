"""Where a result comes from: commit and machine, for every results file."""

from __future__ import annotations

import os
import platform
import subprocess
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
    """Get the commit that git describes, or the one that the file COMMIT names."""
    if COMMIT.exists():
        return COMMIT.read_text().strip()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return described.stdout.strip()

"""Where a result comes from: commit and machine, for every results file."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Get the commit of the tree (marked when it has changes) and the machine."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "torch": torch.__version__}
    return {"commit": described.stdout.strip(), "machine": machine}

"""Processes that start with the start-up file of the wheel, as in an environment where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..effort import PATIENCE

ROOT = Path(__file__).parents[2]
START_UP = ROOT / "src" / "spectune_autoload.pth"


def run_installed(folder: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Get a finished process that began as Python does with this folder among its site-packages."""
    folder.mkdir(exist_ok=True)
    if not (folder / START_UP.name).exists():
        shutil.copy(START_UP, folder)
    begin = "import site, sys; site.addsitedir(sys.argv.pop(1))\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code, str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ, **environment},
    )

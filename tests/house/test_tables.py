"""Tables of numbers are generated from the committed results, never typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_pages_say_what_the_results_say() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

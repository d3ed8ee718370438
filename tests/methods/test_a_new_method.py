"""A method is one file and one row: a toy with an option of its own lives a whole life and keeps the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_new_method_is_one_file_and_one_row() -> None:
    files = [str(HERE / name) for name in ("toy_life.py", "test_contract.py")]
    chosen = ["-p", "tests.methods.toy_row", "-p", "no:cacheprovider", "-n", "0", "-k", "toy or contract"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen, *files],
        cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "failed" not in done.stdout

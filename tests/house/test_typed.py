"""A script with every public name passes `mypy --strict`, as it would for somebody who installed the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spectune

from ..effort import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "release" / "every_name.py"
# torch is not read, which takes most of a minute; `make release` reads all of it.
CONFIG = "[mypy]\nstrict = true\nignore_missing_imports = true\n" + "".join(
    f"[mypy-{name}.*]\nfollow_imports = {how}\n"
    for name, how in {"spectune": "silent", **dict.fromkeys(("torch", "transformers", "peft", "numpy"), "skip")}.items()
)


def checked(folder: Path, *scripts: Path) -> str:
    (folder / "mypy.ini").write_text(CONFIG)
    words = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder / "cache"), "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *words, *map(str, scripts)]
    told = {"MYPYPATH": str(ROOT / "src"), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, env=told, timeout=PATIENCE).stdout


@pytest.mark.slow
def test_a_script_with_every_public_name_is_strictly_typed(tmp_path: Path) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", text.partition("\n)\n")[2]) for name in spectune.__all__)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace("rank=4", 'rank="4"').replace("bank.load(", "bank.lode("))
    said = checked(tmp_path, SCRIPT, wrong)
    assert "every_name.py" not in said
    assert '"decompose" has incompatible type "str"' in said and '"AdapterBank" has no attribute "lode"' in said

"""Every test that the docs name exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def named() -> list[tuple[str, str, str]]:
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    return [(page.name, *found) for page in pages for found in NAMED.findall(page.read_text("utf-8"))]


def test_every_test_that_a_page_names_exists() -> None:
    assert len(named()) > 10
    for page, file, test in named():
        text = (ROOT / file).read_text("utf-8") if (ROOT / file).is_file() else ""
        assert f"def {test}(" in text if test else text, f"{page}: {file} {test}"

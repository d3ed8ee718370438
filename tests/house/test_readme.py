"""Every command and code block of README and docs works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..warm import script, spectune

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "docs", ROOT / "examples"]
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted(folder.rglob("*.md")))]


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [
        (f"{page.relative_to(ROOT)}-{i}", block)
        for page in PAGES
        for i, block in enumerate(pattern.findall(page.read_text()))
    ]


# The blocks of the tutorials belong together: test_journeys.py runs them in order.
ALONE = [(place, code) for place, code in blocks("python") if not place.startswith("docs/tutorials")]


@pytest.mark.parametrize(("place", "code"), ALONE, ids=[place for place, _ in ALONE])
def test_python_blocks_run(place: str, code: str, tmp_path: Path) -> None:
    done = script(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def named_after(word: str) -> set[str]:
    """Every word that follows `word` at the start of a command, in a code span or on a console line."""
    pattern = re.compile(rf"(?:^\s*\$ |^|`){word} ([a-z][a-z-]*)", re.M)
    return {name for page in PAGES for name in pattern.findall(page.read_text())}


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= named_after("make") <= targets


def test_spectune_verbs_that_are_named_exist() -> None:
    done = spectune("--help", COLUMNS="200", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0, done.stderr
    # A verb stands first on its line of the help page, behind at most the frame.
    verbs = set(re.findall(r"^[^\w-]*([a-z][a-z-]*)\b", done.stdout, re.M))
    assert named_after("spectune") <= verbs

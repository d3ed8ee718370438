"""The docs as a site: every page is in the menu, the reference is what the code says, the tutorial's commands work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..effort import PATIENCE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.M | re.S)


def written_pages() -> Any:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["run-keys.md", "commands.md", "python.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    found = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert found == written_pages().PAGES[name](), "run python docs/make_reference.py"


def test_the_readme_has_every_method() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8") == written_pages().readme(), "run docs/make_reference.py"


def places(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    return [place for entry in (menu.values() if isinstance(menu, dict) else menu) for place in places(entry)]


def test_every_page_is_in_the_menu_once() -> None:
    menu = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for aim in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / aim).exists(), f"{page.relative_to(ROOT)}: {aim}"


def test_the_site_builds_without_a_warning_or_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    silent = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=silent, timeout=PATIENCE)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert "save_basis" in page  # the docstring of SpectralConfig is there

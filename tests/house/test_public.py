"""What a release promises: the committed list is what the code has, and it is read by people."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIST = ROOT / "docs" / "reference" / "public.json"


def found_now() -> Any:
    spec = spec_from_file_location("make_public", ROOT / "docs" / "make_public.py")
    assert spec is not None and spec.loader is not None
    sys.modules["make_public"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.public()


def changes(before: dict[str, str], now: dict[str, str]) -> tuple[list[str], list[str]]:
    """Get what is gone or different, and what is new."""
    broken = [f"- {name}: {kind}" for name, kind in before.items() if name not in now]
    broken += [f"! {name}: {kind} -> {now[name]}" for name, kind in before.items() if now.get(name, kind) != kind]
    return broken, [f"+ {name}: {now[name]}" for name in now if name not in before]


def test_the_public_list_is_what_the_code_has() -> None:
    pytest.importorskip("diffusers")  # the names for pictures are in the list
    before, now = json.loads(LIST.read_text(encoding="utf-8")), found_now()
    assert before.keys() == now.keys()
    pairs = [changes(before[part], now[part]) for part in now]
    broken, new = [line for lines, _ in pairs for line in lines], [line for _, lines in pairs for line in lines]
    assert not broken, (
        "This takes away or changes something public (docs/what-stays.md). If it is meant: a line under 'Changed' in "
        "CHANGELOG.md that says what to write instead, a new minor version (from 1.0 on a major one), and "
        "python docs/make_public.py\n" + "\n".join(broken)
    )
    assert not new, "New and public: a line in CHANGELOG.md, then python docs/make_public.py\n" + "\n".join(new)


def test_gone_changed_and_new_are_told_apart() -> None:
    broken, new = changes({"a": "int = 1", "b": "", "c": "x"}, {"a": "int = 2", "c": "x", "d": "y"})
    assert broken == ["- b: ", "! a: int = 1 -> int = 2"] and new == ["+ d: y"]


def test_one_version_everywhere() -> None:
    import spectune

    said = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", said, re.M) == [spectune.__version__]
    built = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.*)"$', built, re.M) == [spectune.__version__]
    assert f"## {spectune.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

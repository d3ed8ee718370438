"""The names of a method's tensors are the method's business: no other room writes them down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectune.methods import METHODS, build_method
from spectune.records import Spectrum
from tests.methods.cases import CASES

SOURCE = Path(__file__).parents[2] / "src" / "spectune"
# Rooms that never hold an adapter's tensors, where the same letters are SVG, units, columns of tables, formats.
ELSEWHERE = {"methods", "pages", "cli", "sweeps", "checkpoint"}
# (file, word) that is something else there.
OTHER_MEANINGS = {("papers/experiments.py", "rows")}


def tensor_names() -> set[str]:
    """Everything that any method trains, shares or freezes."""
    names: set[str] = set()
    for name, options in CASES.values():
        method, shape = build_method(name, options), (12, 12)
        spectrum = Spectrum.unknown(*shape, method.basis(*shape)[0])
        names |= {*method.trained_shapes(*shape), *method.shared_shapes(*shape), *method.frozen(spectrum)}
    return names


def named(code: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """Get (line, word) for every quoted string and every attribute that is such a name."""
    for node in ast.walk(ast.parse(code)):
        word = node.value if isinstance(node, ast.Constant) else None
        if isinstance(node, ast.Attribute) and "_" in node.attr:
            word = node.attr  # only names that are nothing else: .A_U, not .rows
        if isinstance(word, str) and word in names:
            yield node.lineno, word  # type: ignore[attr-defined]


def test_no_room_but_methods_names_a_tensor_of_a_method() -> None:
    names = tensor_names()
    assert {"A_U", "M", "H", "U_rest", "rows", "skew_U", "shift", "P", "A"} <= names
    assert {name for name, _ in CASES.values()} == set(METHODS)
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {word!r}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] not in ELSEWHERE
        for line, word in named(path.read_text(), names)
        if (path.relative_to(SOURCE).as_posix(), word) not in OTHER_MEANINGS
    ]
    assert found == []


@pytest.mark.parametrize("code", ['trained["A_U"]', '"H" not in names', "module.A_Vh", 'LARGE = ("U_rest",)'])
def test_a_planted_name_is_found(code: str) -> None:
    assert list(named(code, tensor_names()))

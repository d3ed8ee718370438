"""One name, one thing: class names, and the letters that tensors carry for their shapes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spectune

SOURCE = Path(spectune.__file__).parent


def public_classes(tree: ast.Module) -> Iterator[str]:
    """Get the public classes of a file; private ones are nobody else's business."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def aliases(tree: ast.Module) -> Iterator[str]:
    """Get the capitalised names that a file assigns at its top, such as `Grams = dict[str, Tensor]`."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id[0].isupper() and not target.id.isupper():
            yield target.id


def clashes(files: dict[str, str]) -> dict[str, list[str]]:
    """Get class name -> the files where it is a class or an alias, for names that are in more than one."""
    classes: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for path, text in files.items():
        tree = ast.parse(text)
        for name in public_classes(tree):
            classes.setdefault(name, []).append(path)
        for name in aliases(tree):
            others.setdefault(name, []).append(path)
    found = {name: [*paths, *others.get(name, [])] for name, paths in classes.items()}
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_every_class_name_exists_once() -> None:
    assert clashes({str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.py")}) == {}


@pytest.mark.parametrize("other", ["class Cut: ...", "Cut = dict[str, int]"])
def test_a_second_class_or_alias_of_that_name_is_caught(other: str) -> None:
    assert clashes({"a.py": "class Cut: ...", "b.py": other, "c.py": "class _Cut: ..."}) == {"Cut": ["a.py", "b.py"]}

"""One name, one thing: class names, and the letters that tensors carry for their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import spectune
from spectune.methods import METHODS

SOURCE = Path(spectune.__file__).parent
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
# The side of a weight that a name belongs to (`A_Vh`), not a shape.
SIDES = ("U", "V", "Vh")


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
    """Get name -> the files where it is a class or an alias, for names that are in more than one."""
    classes: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for path, text in files.items():
        tree = ast.parse(text)
        for name in public_classes(tree):
            classes.setdefault(name, []).append(path)
        for name in aliases(tree):
            others.setdefault(name, []).append(path)
    found = {name: [*classes.get(name, []), *others.get(name, [])] for name in classes | others}
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_every_class_and_alias_name_exists_once() -> None:
    assert clashes({str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.py")}) == {}


@pytest.mark.parametrize("one", ["class Cut: ...", "Cut = list[int]"])
@pytest.mark.parametrize("other", ["class Cut: ...", "Cut = dict[str, int]"])
def test_a_second_class_or_alias_of_that_name_is_caught(one: str, other: str) -> None:
    found = clashes({"a.py": one, "b.py": other, "c.py": "class _Cut: ..."})
    assert {name: sorted(paths) for name, paths in found.items()} == {"Cut": ["a.py", "b.py"]}


def legend(text: str) -> set[str]:
    """Get the letters of the table in CONTRIBUTING."""
    rows = re.findall(r"^ *\|((?: `[A-Za-z]`)+) \|", text, re.MULTILINE)
    return {letter for row in rows for letter in re.findall(r"`(.)`", row)}


def shapes(tree: ast.Module) -> dict[str, str]:
    """Get name -> its shape letters, for every tensor that is bound in a function or a class."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            bound.add(node.id if isinstance(node, ast.Name) else node.attr)
    found = {name: re.fullmatch(r"\w*[A-Za-z]\w*_([A-Za-z0-9]{1,4})", name) for name in bound}
    letters = {name: match[1] for name, match in found.items() if match is not None}
    return {name: word for name, word in letters.items() if is_shape(name, word)}


def is_shape(name: str, letters: str) -> bool:
    """Ask whether the end of a name says a shape: with a capital or a digit, or one letter; in no CONSTANT."""
    if name in METHODS:  # spectral_a
        return False
    constant = name.isupper() and len(name.rpartition("_")[0]) > 1
    return (
        letters not in SIDES
        and not constant
        and (letters != letters.lower() or len(letters) == 1 or letters[-1].isdigit())
    )


def test_every_shape_letter_is_in_the_legend() -> None:
    known, unknown = legend(CONTRIBUTING.read_text()) | set("0123456789"), {}
    for path in SOURCE.rglob("*.py"):
        for name, letters in shapes(ast.parse(path.read_text())).items():
            if not set(letters) <= known:
                unknown[name] = str(path.relative_to(SOURCE))
    assert unknown == {}


def test_every_letter_of_the_legend_is_used() -> None:
    trees = [ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")]
    assert legend(CONTRIBUTING.read_text()) <= {
        letter for tree in trees for word in shapes(tree).values() for letter in word
    }


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("W_OI = x", {"W_OI": "OI"}),
        ("def f(rest_BbA): ...", {"rest_BbA": "BbA"}),
        ("self.values_k = x", {"values_k": "k"}),
        ("LIMIT_UP_TO = A_Vh = plan_of = 1", {}),
    ],
)
def test_shape_letters_are_read_off_names(code: str, found: dict[str, str]) -> None:
    assert shapes(ast.parse(code)) == found

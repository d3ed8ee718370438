"""What `spectune` promises by name, and that a room's door is only a list of names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import spectune

SOURCE = Path(spectune.__file__).parent


def test_every_public_name_is_there() -> None:
    for name in spectune.__all__:
        assert getattr(spectune, name) is not None, name
    assert set(spectune.__all__) <= set(dir(spectune))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(spectune, "SpectralCnofig")


def is_allowed_in_a_door(node: ast.stmt, room: str) -> bool:
    """Ask whether a statement may stand in a room's `__init__`: imports, `__all__`, a docstring.

    `tuner` alone also acts: importing it registers the method with PEFT.
    """
    if isinstance(node, ast.Expr):
        is_docstring = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return is_docstring or (room == "tuner" and ast.unparse(node) == "register.register()")
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] == ["__all__"]
    return isinstance(node, (ast.Import, ast.ImportFrom))


def test_a_rooms_door_is_a_list_of_names() -> None:
    for door in SOURCE.glob("*/__init__.py"):
        for node in ast.parse(door.read_text()).body:
            assert is_allowed_in_a_door(node, door.parent.name), f"{door}:{node.lineno}"


@pytest.mark.parametrize("code", ["x = 1", "def f(): ...", "register.register()", "if True:\n    import os"])
def test_anything_else_in_a_door_is_caught(code: str) -> None:
    assert not is_allowed_in_a_door(ast.parse(code).body[0], "methods")


def test_public_functions_and_classes_say_what_they_give() -> None:
    for name in spectune.__all__:
        thing = getattr(spectune, name)
        if callable(thing):
            assert thing.__doc__ and len(thing.__doc__.splitlines()[0]) > 20, name

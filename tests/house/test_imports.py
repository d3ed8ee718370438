"""The house: a room imports only rooms on a lower floor, and each heavy dependency has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "spectune"

FLOORS: dict[str, int] = {
    "__main__": 11,
    "cli": 10,
    "plugins": 9,
    "papers": 8,
    "pages": 8,
    "demo": 7,
    "sweeps": 7,
    "surveys": 7,
    "runs": 6,
    "concepts": 6,
    "recipes": 5,
    "extraction": 6,
    "bank": 5,
    "training": 4,
    "tuner": 4,
    "export": 5,
    "fusion": 4,
    "adapter": 3,
    "methods": 2,
    "spectrum": 2,
    "checkpoint": 1,
    "algebra": 1,
    "records": 0,
    "errors": -1,
    "other_words": -2,
    "thin_svd": -2,
}
# Dependency -> the only rooms that may import it. Nothing is listed that many rooms need (torch, safetensors).
DOORS: dict[str, set[str]] = {
    "peft": {"tuner"},
    "typer": {"cli"},
    "jinja2": {"pages"},
    "accelerate": {"training"},
    "axolotl": {"plugins"},
    "swift": {"plugins"},
    "vllm": {"plugins"},
    "ray": {"sweeps"},
    "submitit": {"sweeps"},
    "optuna": {"sweeps"},
    "fsspec": {"sweeps"},
    "django": set(),
}
FORBIDDEN_FILES = {"utils.py", "common.py", "other.py", "helpers.py", "misc.py"}
LONGEST_FILE = 300


def imports_of(path: Path, source: Path) -> set[str]:
    """Every module that a file imports, absolute, also inside functions and under TYPE_CHECKING."""
    package = ("spectune", *path.relative_to(source).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = list(package[: len(package) - node.level]) if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            from_the_front = node.module is None or module == "spectune"
            found |= {f"{module}.{alias.name}" for alias in node.names} if from_the_front else {module}
    return found


def broken_rules(source: Path) -> list[str]:
    """One line for each import, name or size that breaks a rule."""
    broken = []
    for path in sorted(source.rglob("*.py")):
        place = path.relative_to(source)
        if place.name in FORBIDDEN_FILES:
            broken.append(f"{place}: a file needs a noun for a name")
        if len(path.read_text().splitlines()) > LONGEST_FILE:
            broken.append(f"{place}: over {LONGEST_FILE} lines")
        if len(place.parts) == 1 and place.stem == "__init__":
            continue  # the front door stands above all rooms
        room = place.parts[0].removesuffix(".py")
        for name in sorted(imports_of(path, source)):
            top, *rest = name.split(".")
            if top in DOORS and room not in DOORS[top]:
                broken.append(f"{place}: only {', '.join(DOORS[top])} may import {top}")
            if top != "spectune" or rest[:1] in ([room], ["__version__"]):
                continue
            aim = rest[0] if rest else "the front door"
            if FLOORS.get(aim, 99) >= FLOORS[room]:
                broken.append(f"{place}: {room} must not import {aim}")
    return broken


def test_every_import_points_down_and_every_door_is_kept() -> None:
    assert broken_rules(SOURCE) == []


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize(
    ("place", "code", "rule"),
    [
        ("methods/x.py", "from ..tuner import layer", "methods must not import tuner"),
        ("methods/x.py", "def f():\n    from ..export.lora import g", "methods must not import export"),
        ("fusion/x.py", "from .. import tuner", "fusion must not import tuner"),
        ("export/x.py", "import spectune.bank", "export must not import bank"),
        ("export/x.py", "from peft import PeftModel", "only tuner may import peft"),
        (
            "spectrum/x.py",
            "if TYPE_CHECKING:\n    from ..methods import Method",
            "spectrum must not import methods",
        ),
        ("methods/x.py", "from spectune import tuner", "methods must not import tuner"),
        ("methods/x.py", "from .. import SpectralConfig", "methods must not import SpectralConfig"),
        ("methods/x.py", "import spectune", "methods must not import the front door"),
        ("algebra.py", "from .checkpoint import reader", "algebra must not import checkpoint"),
        ("recipes/__init__.py", "from ..runs import run", "recipes must not import runs"),
        ("spectrum/utils.py", "", "a file needs a noun for a name"),
        ("spectrum/x.py", "\n" * (LONGEST_FILE + 1), f"over {LONGEST_FILE} lines"),
    ],
)
def test_a_planted_break_is_caught(tmp_path: Path, place: str, code: str, rule: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert any(rule in line for line in broken_rules(tmp_path))


def test_imports_that_keep_the_rules_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "x.py").write_text(
        "import torch\nfrom .. import __version__\nfrom ..methods import METHODS\nfrom .y import z\n"
    )
    (tmp_path / "__init__.py").write_text("from .tuner import SpectralConfig\n")
    assert broken_rules(tmp_path) == []

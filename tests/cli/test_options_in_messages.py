"""Every `--option` that a message, a help text or a page of the docs names is one that its command has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from spectune.cli.app import app

ROOT = Path(__file__).parents[2]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])")
# Options of other programs: those of git, vLLM, llama.cpp, Ray, and those that `spectune trl` adds to trl's.
FOREIGN = {"--adapter", "--error-unmatch", "--always", "--dirty", "--max-lora-rank"}
FOREIGN |= {"--enable-lora", "--lora-modules", "--lora", "--head"}
COMMAND = re.compile(r"spectune ([a-z]+)((?: [^`\n;.]*)?)")


def options() -> dict[str, set[str]]:
    """Verb -> the options that it has."""
    verbs: Any = typer.main.get_command(app)
    own = {word for parameter in verbs.params for word in parameter.opts}
    return {"": own} | {
        name: {word for parameter in verb.params for word in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}
        for name, verb in verbs.commands.items()
    }


def sentences(path: Path) -> list[str]:
    """Every text in a source file but what heads it, with … in place of what an f-string puts in."""
    found, inner = [], set[int]()
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            inner |= {id(part) for part in node.values}
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            found.append(node.value)
    return found


SOURCES = sorted((ROOT / "src" / "spectune").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def unknown(text: str, known: dict[str, set[str]]) -> list[str]:
    """The options in a text that no command has, or not the command beside them."""
    everywhere = set().union(*known.values()) | FOREIGN
    return [word for word in OPTION.findall(text) if word not in everywhere] + misplaced(text, known)


def misplaced(text: str, known: dict[str, set[str]]) -> list[str]:
    """The options after `spectune VERB` that this verb has not."""
    found = []
    for verb, words in COMMAND.findall(text):
        if verb in known:
            found += [f"{verb} {word}" for word in OPTION.findall(words) if word not in known[verb] | FOREIGN]
    return found


def test_a_message_names_no_option_that_does_not_exist() -> None:
    known = options()
    wrong = {path.name: bad for path in SOURCES for text in sentences(path) if (bad := unknown(text, known))}
    assert not wrong and "--overwrite" in known["train"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_no_option_that_does_not_exist(path: Path) -> None:
    known = options()
    assert not [bad for line in path.read_text("utf-8").splitlines() for bad in misplaced(line, known)]


def test_the_scan_sees_what_is_wrong() -> None:
    known = options()
    assert unknown("Pass --owerwrite.", known) == ["--owerwrite"]
    assert unknown("use `spectune report RUN --resume`", known) == ["report --resume"]

"""What model cards are made of: text that is safe in Markdown and YAML, the base's name, its licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.base import HUB_NAME
from ..errors import printable

# Of one thing that a file says. Chosen.
LONGEST = 300
MARKUP = re.compile(r"([\\`*_\[\]<>|#!~&{}])")
CARD = "README.md"
# A card's front matter has a few kilobytes. Chosen.
MOST_FRONT = 2**16
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+ -]{0,63}")
LICENCE_KEYS = ("license", "license_name", "license_link")
# The hub's word for a licence that nobody has stated.
UNKNOWN = "unknown"


def plain(words: object) -> str:
    """Get words that Markdown shows as they are, on one line: control letters and markup are escaped."""
    text = printable(words)
    return MARKUP.sub(r"\\\1", text if len(text) <= LONGEST else f"{text[:LONGEST]} […]")


def front_matter(said: Mapping[str, Any]) -> list[str]:
    """Get the lines that the hub reads: JSON is YAML, and its strings hold no letter that ends them."""
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in sorted(said.items())), "---", ""]


def table(rows: Mapping[str, object]) -> list[str]:
    """Get a table of two columns; rows without a value are left out."""
    kept = {name: value for name, value in rows.items() if value not in (None, "", [], {})}
    return ["| | |", "| --- | --- |", *(f"| {plain(name)} | {plain(value)} |" for name, value in kept.items()), ""]


@dataclass(frozen=True)
class BaseSaid:
    """A base model as others may know it."""

    name: str
    """A hub name, or the last part of a path: the rest means nothing elsewhere."""
    hub: str | None
    licence: dict[str, str] = field(default_factory=dict)
    """The licence fields of the base's own card; empty if it has none here."""

    @classmethod
    def of(cls, name: str, folder: Path | None = None) -> BaseSaid:
        """Get what is known of a base; `folder` is where its files are."""
        if not name:  # a live model that was built from a config
            return cls("a model", None)
        folder = folder or (Path(name) if Path(name).is_dir() else None)
        here = Path(name).exists() or name.startswith(("/", "\\", ".", "~"))
        hub = None if here or not HUB_NAME.fullmatch(name) else name
        return cls(hub or re.split(r"[/\\]", name.rstrip("/\\"))[-1], hub, _licence(folder) if folder else {})

    @property
    def metadata(self) -> dict[str, Any]:
        """Its part of the front matter."""
        return {**({"base_model": self.hub} if self.hub else {}), **(self.licence or {"license": UNKNOWN})}

    @property
    def licence_lines(self) -> list[str]:
        """What the card says of the licence."""
        if not self.licence:
            said = "The licence is not known here: the base's files do not state one. Fill in `license` above"
            return ["## Licence", "", f"{said} before you share this; the base's licence and limits apply.", ""]
        return [
            "## Licence",
            "",
            f"{plain(self.licence['license'])}, as the base's card states. The base's limits apply, too.",
            "",
        ]


def _licence(folder: Path) -> dict[str, str]:
    """Get the licence fields of a folder's card; nothing for one that is missing, odd or damaged."""
    try:
        with (folder / CARD).open(encoding="utf-8") as file:
            head = file.read(MOST_FRONT)
    except (OSError, UnicodeDecodeError):
        return {}
    if not head.startswith("---\n") or "\n---" not in head[4:]:
        return {}
    try:
        said = yaml.safe_load(head[4 : head.index("\n---", 4)])
    except (yaml.YAMLError, RecursionError):
        return {}
    found = {key: said[key] for key in LICENCE_KEYS if isinstance(said, dict) and isinstance(said.get(key), str)}
    return found if LICENCE.fullmatch(found.get("license", "")) else {}

"""`Origin`: where a config was read from. A config without one is the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where a config was read, which makes its patterns and its sizes a stranger's.

    Both parts are None where somebody else has read the file (transformers, AutoPeftModel), and in a changed copy of
    a config: its patterns still are a stranger's, but no file backs what it says.
    """

    place: str | None = None
    """The folder or repository whose tensors come with this config."""
    folder: Path | None = None
    """That folder, where it is on this machine, until an injection has been held to it."""

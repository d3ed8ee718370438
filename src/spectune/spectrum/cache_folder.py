"""Whose a cache folder is: spectune's own, by a marker in it; and which files in it are entries, by their exact names.

Nothing else in a folder is ever deleted. A folder that holds other things is refused before anything is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..checkpoint import TensorFile, refuse_address
from ..errors import AdapterError, OutputError

MARKER = ".spectune-bases"
MARKED = "A cache of singular bases. `spectune cache clear` empties it; entries that fit may be deleted at any time.\n"
# Entries of every release say which format they have, and all formats begin so.
KINDS = "spectune basis "
# entry_name: the weight's SHA-256 and twelve digits of what was asked; the folder is its first two digits.
SHELF = re.compile(r"[0-9a-f]{2}")
ENTRY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{12}\.safetensors")
# What `save_tensors` leaves where its process is killed.
HALF = re.compile(rf"\.{ENTRY.pattern}\.partial-[0-9a-f]{{8}}")


def entries_in(folder: Path) -> Iterator[Path]:
    """Get the files of a cache that bear an entry's exact name, in the folder that belongs to it."""
    return (path for path in _own(folder, ENTRY) if path.name[:2] == path.parent.name)


def entries_of(folder: Path, identity: str) -> list[Path]:
    """Get the entries of one weight, known by its SHA-256."""
    shelf = folder / identity[:2]
    found = shelf.glob(f"{identity}-*.safetensors") if _is_folder(shelf) else ()
    return [path for path in found if ENTRY.fullmatch(path.name) and _is_file(path)]


def halves_in(folder: Path) -> Iterator[Path]:
    """Get what killed processes may have left of entries."""
    return (path for path in _own(folder, HALF) if path.name[1:3] == path.parent.name)


def claim(folder: Path) -> None:
    """Make a folder a cache, or see that it is one; `OutputError` for a folder that holds anything else.

    A new or empty folder is marked, and so is a cache that an earlier release made: one that holds entries alone.
    """
    refuse_address(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_marked(folder):
            return
        try:
            refuse_foreign(folder)
        except OutputError:
            if not is_marked(folder):  # else another process has just made it, and fills it
                raise
        with suppress(FileExistsError):  # another process has just made it
            with open(folder / MARKER, "x", encoding="utf-8") as file:
                file.write(MARKED)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot write to the cache: {error.strerror}. Choose another folder.") from error


def make_shelf(shelf: Path) -> None:
    """Make the folder below the cache's that an entry stands in; `OutputError` if it cannot be, or is a link."""
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        why = None if _is_folder(shelf) else "this is a link"
    except OSError as error:
        why = error.strerror
    if why is not None:
        raise OutputError(f"{shelf}: cannot write to the cache: {why}. Choose another folder.")


def is_marked(folder: Path) -> bool:
    """Ask whether spectune has made this folder, or taken it over."""
    return (folder / MARKER).is_file() and not (folder / MARKER).is_symlink()


def refuse_foreign(folder: Path) -> None:
    """Raise `OutputError` where an unmarked folder is not a cache of an earlier release either."""
    known = {*entries_in(folder), *halves_in(folder)}
    shelves = {path for path in folder.iterdir() if SHELF.fullmatch(path.name) and _is_folder(path)}
    inside = {path for shelf in shelves for path in shelf.iterdir()}
    marker = {folder / MARKER} if is_marked(folder) else set()
    others = sorted(({*folder.iterdir()} - shelves - marker) | (inside - known))
    entries = [path for path in known if ENTRY.fullmatch(path.name)]
    if not others and (not entries or any(map(_says_entry, entries))):
        return
    found = str((others or sorted(entries))[0].relative_to(folder))
    raise OutputError(
        f"{folder}: asked for a cache of bases, found {found!r} in it, and no {MARKER} that shows that spectune made "
        f"this folder. Nothing in it was changed. Name a new or empty folder."
    )


def _own(folder: Path, name: re.Pattern[str]) -> Iterator[Path]:
    for shelf in folder.glob("[0-9a-f][0-9a-f]"):
        if _is_folder(shelf):
            with suppress(FileNotFoundError):
                yield from (path for path in shelf.iterdir() if name.fullmatch(path.name) and _is_file(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_file(path: Path) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def _says_entry(path: Path) -> bool:
    with suppress(AdapterError, OSError):
        return TensorFile.open(path).metadata.get("kind", "").startswith(KINDS)
    return False

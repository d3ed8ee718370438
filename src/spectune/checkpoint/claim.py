"""Which process owns a folder: claims that end with their process, and swapping two folders in one step."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError

PARTIAL, REPLACED = "partial", "replaced"
LOCK_FILE = ".lock"
# linux/fs.h and fcntl.h
RENAME_EXCHANGE, AT_FDCWD = 2, -100


def sibling(goal: Path, word: str) -> Path:
    """Get an unused hidden name beside `goal`: `.NAME.WORD-` and eight random digits."""
    return goal.with_name(f".{goal.name}.{word}-{secrets.token_hex(4)}")


@contextmanager
def hold_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the only process that writes into an existing folder; `OutputError` if another one does.

    The lock belongs to the open file `.lock` in it, so it ends with the process, even after kill -9; the empty file
    stays. `patience`: seconds to wait for it. `OutputError` also for a folder that cannot be locked or contains links.
    """
    refuse_links(folder)  # before the lock, which would empty a file through a link
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise OutputError(
            f"{folder}: another process is writing into this folder. Wait for it, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{folder}: cannot lock this folder: {why}. Choose a folder on another disk.") from error
    try:
        yield
    finally:
        lock.release()


def refuse_links(folder: Path) -> None:
    """Raise `OutputError` for a link anywhere in a folder that is written into.

    Through a link, a stranger's folder could redirect a checkpoint, or the deletion of one, to any place.
    """
    for inside, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(inside, name)
            if path.is_symlink():
                raise OutputError(
                    f"{folder}: {path.relative_to(folder)} is a link, and nothing is written or deleted through links. "
                    f"Replace it with its target, or choose another folder."
                )


@contextmanager
def claimed_folder(goal: Path) -> Iterator[Path]:
    """Get a new hidden folder beside `goal`, claimed by this process."""
    while True:
        partial = sibling(goal, PARTIAL)
        partial.mkdir()
        with suppress(BlockingIOError, FileNotFoundError):
            claim = _claim(partial)
            if claim is None or _is_same(claim, partial):
                break
            os.close(claim)
        # Another process deleted it as abandoned before it was claimed: try again.
    try:
        yield partial
    finally:
        if claim is not None:
            os.close(claim)


def clear_abandoned(goal: Path) -> None:
    """Delete what killed processes left beside `goal`, and restore a folder that one of them was about to replace.

    Never touches a folder that a living process works in, nor one whose disk has no locks.
    """
    for left in _left_beside(goal, REPLACED):
        if not os.path.lexists(goal):
            with suppress(OSError):
                left.rename(goal)
    for left in [*_left_beside(goal, PARTIAL), *_left_beside(goal, REPLACED)]:
        with suppress(BlockingIOError, FileNotFoundError):
            claim = _claim(left)
            if claim is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(claim)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically, so that both names always exist; False if the system or the disk cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # musl before 1.2.6, glibc before 2.28
        return False
    done: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0


def _left_beside(goal: Path, word: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(goal.name)}\.{word}-[0-9a-f]{{8}}")
    found = goal.parent.glob(f".{glob.escape(goal.name)}.{word}-*")
    return [path for path in found if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _claim(folder: Path) -> int | None:
    """Get an open handle that holds the folder's lock, or None if the disk has no such locks.

    BlockingIOError if another process holds it, FileNotFoundError if the folder is gone.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _is_same(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False

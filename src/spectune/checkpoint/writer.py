"""Files and folders that are complete or not there: `fresh_folder`, `write_atomically`, `save_tensors`.

Everything is written under a temporary name beside its goal, pushed to the disk, and then renamed. A
rename inside one folder is atomic, so a crash or Ctrl-C never leaves half a file under the real name.
A process that is killed outright may leave a `.NAME.partial-*` behind, which can be deleted.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import OutputError


@contextmanager
def fresh_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Get an empty folder to write in, which becomes `path` when the block ends, and vanishes when it raises.

    Missing parents are created. `OutputError`, before the block runs, where `path` is a file, a folder
    that holds something, or cannot be written. With `overwrite` a full folder is replaced, but only once
    the new one is complete; it is put back should the last rename fail. A folder that holds the working
    or the home directory is never replaced.
    """
    goal = Path(os.path.realpath(path))
    _refuse_occupied(goal, overwrite)
    partial = _sibling(goal, "partial")
    created = _make_parents(goal)
    try:
        _make_folder(partial, goal)
        yield partial
        _sync_tree(partial)
        _put_in_place(partial, goal)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(created)
        raise


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a whole file or leave what was there; text is written as UTF-8. `OutputError` if it cannot be."""
    data = content.encode() if isinstance(content, str) else content
    with _replaced_file(Path(path), len(data)) as partial:
        partial.write_bytes(data)


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or leave what was there. Tensors on any device; views are copied.

    `metadata` is joined to `{"format": "pt"}`, which transformers asks for. `OutputError` if it cannot
    be written.
    """
    owned = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in owned.items():
        # safetensors refuses two names on one storage: readers would not know that they were tied.
        place = tensor.untyped_storage().data_ptr()
        if place in seen and tensor.numel():
            owned[name] = tensor.clone()
        seen.add(place)
    size = sum(tensor.numel() * tensor.element_size() for tensor in owned.values())
    with _replaced_file(Path(path), size) as partial:
        save_file(owned, str(partial), metadata={"format": "pt"} | dict(metadata or {}))
        # safetensors creates its file readable by the owner alone; give it what `open` would.
        partial.chmod(0o666 & ~_umask())


@contextmanager
def _replaced_file(path: Path, size: int) -> Iterator[Path]:
    goal = Path(os.path.realpath(path))
    partial = _sibling(goal, "partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, goal)
    except BaseException as error:
        partial.unlink(missing_ok=True) if goal.parent.is_dir() else None
        if isinstance(error, (OSError, SafetensorError)):
            raise OutputError(
                f"{path}: {size:,} bytes could not be written: {_reason(error)}. {_remedy(goal)}"
            ) from error
        raise
    _sync(goal.parent)


def _refuse_occupied(goal: Path, overwrite: bool) -> None:
    if os.path.lexists(goal) and not goal.is_dir():
        raise OutputError(f"{goal}: asked for an output folder, found a file. Choose another folder.")
    if not goal.is_dir():
        return
    count = len(os.listdir(goal))
    if count and not overwrite:
        things = "1 entry" if count == 1 else f"{count} entries"
        raise OutputError(
            f"{goal}: asked for an empty output folder, found {things} in it. "
            f"Choose another folder, or overwrite this one."
        )
    for precious in (Path.cwd(), Path.home()):
        if goal in (precious, *precious.parents):
            raise OutputError(f"{goal}: replacing this folder would delete {precious}. Choose another folder.")


def _make_parents(goal: Path) -> list[Path]:
    """Create the missing parents and get them, the deepest first."""
    missing = [parent for parent in goal.parents if not parent.exists()]
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise OutputError(f"{goal}: the folder cannot be created: {_reason(error)}. {_remedy(goal)}") from error
    return missing


def _make_folder(partial: Path, goal: Path) -> None:
    try:
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{goal}: the folder cannot be created: {_reason(error)}. {_remedy(goal)}") from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _put_in_place(partial: Path, goal: Path) -> None:
    old = _sibling(goal, "replaced")
    try:
        if goal.exists():
            goal.rename(old)
        partial.rename(goal)
    except BaseException as error:
        if old.exists() and not goal.exists():
            old.rename(goal)
        if isinstance(error, OSError):
            raise OutputError(
                f"{goal}: the finished folder cannot be moved here: {_reason(error)}. {_remedy(goal)}"
            ) from error
        raise
    _sync(goal.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(goal: Path, word: str) -> Path:
    return goal.with_name(f".{goal.name}.{word}-{secrets.token_hex(4)}")


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent, file))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    # Windows cannot open a folder, and some network disks refuse to sync one; the data are written anyway.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _remedy(goal: Path) -> str:
    place = next((parent for parent in goal.parents if parent.is_dir()), goal.parent)
    free = shutil.disk_usage(place).free
    return f"{place} has {free:,} bytes free; check its permissions or choose another folder."

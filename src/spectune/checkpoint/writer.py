"""Files and folders that are either complete or absent: `fresh_folder`, `write_atomically`, `save_tensors`.

Everything is written under a temporary name beside its goal, flushed to the disk, and then renamed. A
rename inside one folder is atomic, so a crash or Ctrl-C never leaves half a file under the real name.
A killed process may leave a `.NAME.partial-*` behind: the next `fresh_folder` of that name deletes such a folder; a
file can be deleted by hand.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import OutputError
from .claim import PARTIAL, REPLACED, claimed_folder, clear_abandoned, exchange, sibling

# Errors of a full, read-only or broken disk.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
# safetensors puts the number into its message; torch's writer only says that too few bytes were written.
FOREIGN_ERROR = re.compile(r"\(os error (\d+)\)")
TORCH_WRITER = "inline_container.cc"
# The begin of s3://… and the like, also as a Path writes it; a drive of Windows has one letter.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def refuse_address(path: str | Path) -> None:
    """Raise `OutputError` for s3://… and the like, which would become a folder named s3: on this machine."""
    if ADDRESS.match(str(path)):
        raise OutputError(
            f"{path}: this is an address, and a path on this machine is needed. Write to a folder and upload it; "
            f"`spectune compare` alone writes to stores."
        )


@contextmanager
def fresh_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Get an empty folder to write in, which becomes `path` when the block ends, and is deleted if it raises.

    Missing parents are created. `OutputError`, before the block runs, if `path` is a file, a folder that is not
    empty, or cannot be written; after it, if another process has filled `path` meanwhile.
    With `overwrite`, a full folder is replaced in one step, once the new one is complete (in two steps if the system
    cannot swap folders; the next call repairs what a kill between them left): of two processes, the last one wins.
    A folder that contains the working or the home directory is never replaced.
    A full disk in the block is an `OutputError`, whoever wrote.
    """
    refuse_address(path)
    goal = Path(os.path.realpath(path))
    clear_abandoned(goal)
    _refuse_occupied(goal, overwrite)
    created = _make_parents(goal)
    try:
        with _made_folder(goal) as partial:
            try:
                yield partial
                sync_tree(partial)
                _put_in_place(partial, goal, overwrite)
            except BaseException as error:
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, OutputError):  # the hidden name means nothing to the user
                    raise OutputError(str(error).replace(str(partial), str(goal))) from error
                if reason := disk_error(error):
                    raise OutputError(f"{goal}: cannot write this folder: {reason}. {_remedy(goal)}") from error
                raise
    except BaseException:
        _remove_empty(created)
        raise


def disk_error(error: BaseException) -> str | None:
    """Get the reason if an error is about the disk: full, read-only, or broken; else None."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return _reason(error)
    number = FOREIGN_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    if number and int(number[1]) in DISK_ERRORS:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and TORCH_WRITER in str(error):
        return "torch did not write all bytes"
    return None


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a whole file or leave the old one; text becomes UTF-8. `OutputError` if it cannot be written."""
    # A lone surrogate, possible in JSON but not in UTF-8, is written as its escape.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with _replaced_file(Path(path), len(data)) as partial:
        partial.write_bytes(data)


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole safetensors file or leave the old one. Tensors on any device; views are copied.

    `metadata` is added to `{"format": "pt"}`, which transformers needs. `OutputError` if it cannot be written.
    """
    owned = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in owned.items():
        # safetensors refuses two names on one storage.
        place = tensor.untyped_storage().data_ptr()
        if place in seen and tensor.numel():
            owned[name] = tensor.clone()
        seen.add(place)
    size = sum(tensor.numel() * tensor.element_size() for tensor in owned.values())
    with _replaced_file(Path(path), size) as partial:
        save_file(owned, str(partial), metadata={"format": "pt"} | dict(metadata or {}))
        # safetensors makes its file readable by the owner alone; give it the permissions of `open`.
        partial.chmod(0o666 & ~_umask())


@contextmanager
def _replaced_file(path: Path, size: int) -> Iterator[Path]:
    refuse_address(path)
    goal = Path(os.path.realpath(path))
    partial = sibling(goal, PARTIAL)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, goal)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OutputError(f"{path}: cannot write {size:,} bytes: {_reason(error)}. {_remedy(goal)}") from error
        raise
    with suppress(OSError):  # the file is already complete
        _sync(goal.parent)


def _refuse_occupied(goal: Path, overwrite: bool) -> None:
    if os.path.lexists(goal) and not goal.is_dir():
        raise OutputError(f"{goal}: an output folder is needed, but this is a file. Choose another folder.")
    if not goal.is_dir():
        return
    count = len(os.listdir(goal))
    if count and not overwrite:
        things = "1 entry" if count == 1 else f"{count} entries"
        raise OutputError(
            f"{goal}: the output folder must be empty, but contains {things}. Choose another folder, or replace it "
            "with --overwrite (overwrite=True)."
        )
    for precious in (Path.cwd(), Path.home()):
        if goal in (precious, *precious.parents):
            raise OutputError(f"{goal}: replacing this folder would delete {precious}. Choose another folder.")


def _make_parents(goal: Path) -> list[Path]:
    """Create the missing parents and get them, deepest first."""
    missing = [parent for parent in goal.parents if not parent.exists()]
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise OutputError(f"{goal}: cannot create this folder: {_reason(error)}. {_remedy(goal)}") from error
    return missing


@contextmanager
def _made_folder(goal: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(claimed_folder(goal))
        except OSError as error:
            raise OutputError(f"{goal}: cannot create this folder: {_reason(error)}. {_remedy(goal)}") from error
        yield partial


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _put_in_place(partial: Path, goal: Path, overwrite: bool) -> None:
    if overwrite and goal.exists() and exchange(partial, goal):
        with suppress(OSError):
            _sync(goal.parent)
        shutil.rmtree(partial, ignore_errors=True)  # the old one, by now
        return
    old = sibling(goal, REPLACED)
    try:
        if goal.exists() and (overwrite or os.name == "nt"):
            goal.rename(old) if overwrite else goal.rmdir()
        partial.rename(goal)  # replaces an empty folder, and nothing else
    except BaseException as error:
        if old.exists() and not goal.exists():
            old.rename(goal)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(
                f"{goal}: another process has written into this folder meanwhile. Check it, or choose another folder."
            ) from error
        if isinstance(error, OSError):
            raise OutputError(
                f"{goal}: cannot move the finished folder here: {_reason(error)}. {_remedy(goal)}"
            ) from error
        raise
    with suppress(OSError):
        _sync(goal.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush a folder's files to the disk, so that a rename cannot overtake them; OSError if the disk is full."""
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent, file))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Windows cannot open a folder, and some network disks refuse to sync one; the data are written anyway. But a
        # disk that only now notices that it is full (quotas, network disks) has not written them.
        if error.errno in DISK_ERRORS - {errno.EROFS}:
            raise


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

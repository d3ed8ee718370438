"""The places in which a process changes a folder: every opening for writing, rename, removal, and what C code writes.

Python tells of each before it happens (audit events), so nothing is missed that a library underneath does. What
safetensors and torch write in C is announced here; a file just opened, which is empty, is a place of its own.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink",
    "fcntl.flock", "kills.opened", "kills.tensors", "kills.torch",
}  # fmt: skip
# Where bytes are needed; a full disk still renames and removes.
GROWS = {"open", "os.mkdir", "kills.tensors", "kills.torch"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OnPlace = Callable[[int, str, str], None]
"""Called with (number from 1, event, path) before the change happens."""


class _Watch:
    """What the audit hook, which stays for the life of the process, does at the moment."""

    folder: str = ""
    on_place: OnPlace | None = None
    count: int = 0
    installed: bool = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    on_place = _Watch.on_place
    if on_place is None or (event not in CHANGES and event != "open" and event != "ctypes.dlsym"):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
        return
    if event == "ctypes.dlsym" and args[1] != "renameat2":
        return
    path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
    # Removing a tree goes by handles and bare names.
    if os.path.isabs(path) and not path.startswith(_Watch.folder):
        return
    _Watch.count += 1
    _Watch.on_place = None  # what the reaction itself opens is not a place
    try:
        on_place(_Watch.count, event, path)
    finally:
        _Watch.on_place = on_place


@contextmanager
def watching(folder: Path, on_place: OnPlace) -> Iterator[None]:
    """Have `on_place` called before every change inside of a folder."""
    if not _Watch.installed:
        sys.addaudithook(_hook)
        _Watch.installed = True
    kept = builtins.open, io.open, safetensors.torch.serialize_file, torch.save
    opened, _, serialize, save = kept

    def open_(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        handle = opened(file, mode, *args, **more)
        if any(letter in mode for letter in "wax+"):
            sys.audit("kills.opened", file)
        return handle

    def serialize_(tensors: Any, filename: Any, *args: Any, **more: Any) -> Any:
        sys.audit("kills.tensors", filename)
        return serialize(tensors, filename, *args, **more)

    def save_(thing: Any, f: Any, *args: Any, **more: Any) -> Any:
        sys.audit("kills.torch", f if isinstance(f, (str, os.PathLike)) else "")
        return save(thing, f, *args, **more)

    builtins.open = io.open = open_  # type: ignore[assignment]
    safetensors.torch.serialize_file, torch.save = serialize_, save_  # type: ignore[assignment]
    _Watch.folder, _Watch.on_place, _Watch.count = os.path.realpath(folder), on_place, 0
    try:
        yield
    finally:
        _Watch.on_place = None
        builtins.open, io.open, safetensors.torch.serialize_file, torch.save = kept  # type: ignore[assignment]


def count_places() -> int:
    """Get how many changes there were under the last `watching`."""
    return _Watch.count


def kill_at(place: int, torn: bool = False) -> OnPlace:
    """Get what ends this process with SIGKILL before the n-th change; `torn`: with half of the bytes written."""

    def react(number: int, event: str, path: str) -> None:
        if number == place:
            if torn and path and event in ("kills.opened", "kills.tensors", "kills.torch"):
                # safetensors writes beside its goal under such a name and renames; torch writes in place.
                half = os.path.join(os.path.dirname(path), ".tmpHalf00") if event == "kills.tensors" else path
                handle = os.open(half, os.O_WRONLY | os.O_CREAT)
                os.write(handle, b"{" + bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)

    return react


def full_at(place: int) -> OnPlace:
    """Get a disk that is full from the n-th change on: nothing grows any more, renaming and removing go on."""

    def react(number: int, event: str, path: str) -> None:
        if number >= place and event in GROWS:
            raise _no_space(event)

    return react


def read_only_at(place: int) -> OnPlace:
    """Get a disk that takes no change any more from the n-th on, as after an error of the device."""

    def react(number: int, event: str, path: str) -> None:
        if number >= place and event not in ("kills.opened", "fcntl.flock", "ctypes.dlsym"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    return react


def _no_space(event: str) -> Exception:
    """Get the error that each writer raises on a full tmpfs (safetensors 0.8, torch 2.13)."""
    if event == "kills.tensors":
        return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    if event == "kills.torch":
        return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

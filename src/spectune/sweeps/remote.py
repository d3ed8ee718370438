"""`Remote`: the files of a sweep in a store that fsspec reaches, each of them whole or absent.

Only the standard library at the top, as in on_node.py: the nodes of a Ray cluster get this file's code, too.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNS, RUN, RESULT, STATE, CHECKPOINTS = "runs", "run.yaml", "result.json", "trainer_state.json", "checkpoints"
WEIGHTS = ("adapter/", "model/")
WHOLE = re.compile(rf"{CHECKPOINTS}/checkpoint-(\d+)/{STATE}")
"""The file that a checkpoint has when it is whole; it is uploaded last."""
DISKS = ("file", "local", "sftp", "ssh", "hdfs", "arrow_hdfs", "webhdfs", "smb", "ftp")
"""Where another process can see half a file: there, each is written under another name and moved."""
OUTSIDE = re.compile(r"(^|/)(\.{0,2}|[A-Za-z]:[^/]*)(/|$)|[\\\0]")
"""In a name: an empty part, . or .., a drive, a backslash."""
WAITS = (1.0, 5.0, 25.0)
"""Seconds before a file is tried again; chosen, not measured. The clients of stores also try again by themselves."""
SMALL = 2**20
"""Up to so many bytes a file is compared by its content, beyond by size and time; chosen, not measured."""


@dataclass
class Remote:
    """The files of one sweep in a store; names are relative to its address."""

    url: str
    everything: bool = False
    """Whether checkpoints of finished runs are kept, too."""
    sent: dict[str, Any] = field(default_factory=dict, repr=False)
    """Name -> what tells the file's content, as it was last seen here and there alike."""

    blocked: str = ""
    """Why nothing may be written any more."""

    _found: Any = field(default=None, init=False, repr=False)  # a cached_property has a lock, and cannot be sent

    @property
    def opened(self) -> tuple[Any, str, bool]:
        """The file system, the path in it, and whether it is a disk."""
        if self._found is None:
            fs, root = _opened(self.url)
            protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
            self._found = fs, root.rstrip("/"), any(name in DISKS for name in protocols)
        found: tuple[Any, str, bool] = self._found
        return found

    def afar(self) -> Remote:
        """Get the same for another machine: without the connection, and with nothing seen yet."""
        return Remote(self.url, self.everything)

    def check(self, token: str = "", keep: bool = False) -> str:
        """Write a small file and read it back, or read the one of another machine, and get its name.

        `OutputError` if that fails, `MissingExtraError` without the store's package.
        """
        fs, root, disk = self.opened
        name = token or f".seen-{secrets.token_hex(8)}"
        try:
            if not token:
                if disk:
                    fs.makedirs(root, exist_ok=True)
                fs.pipe_file(f"{root}/{name}", name.encode())
            found = fs.cat_file(f"{root}/{name}")
            if not keep and not token:
                fs.rm_file(f"{root}/{name}")
        except Exception as error:
            raise self._refusal(
                "write a file and read it back", error, "Check the address and the credentials"
            ) from None
        if found != name.encode():
            raise self._refusal(
                "read what was written", ValueError(f"{len(found)} other bytes"), "Choose another store"
            )
        return name

    def names(self, under: str = "") -> list[str]:
        """Get the names of all files, or of those in a folder; `OutputError` for one that leads out of it."""
        fs, root, _ = self.opened
        above = f"{root}/{under}".rstrip("/") + "/"
        fs.invalidate_cache()
        with suppress(FileNotFoundError):
            found = [
                str(path) for path in self._tried("list", under or "its files", lambda: fs.find(above.rstrip("/")))
            ]
            inside = [self._inside(path) for path in found if not path.endswith("/")]  # some consoles make empty ones
            return [name for name in inside if f"{root}/{name}".startswith(above) and "/." not in f"/{name}"]
        return []

    def _inside(self, path: str) -> str:
        _, root, _ = self.opened
        name = path.removeprefix(f"{root}/")
        if name == path or OUTSIDE.search(name):
            raise _output_error(f"{self.url}: contains {path!r}, a name that leads out of it. Delete that file there.")
        return name

    def put(self, path: Path, name: str) -> None:
        """Upload a file, unless the store has it like this; `OutputError` once the sweep is another command's."""
        self._refuse_blocked()
        mark = _mark(path)
        if self.sent.get(name) == mark:
            return
        self._tried("write", name, lambda: self._put(str(path), name))
        self.sent[name] = mark

    def _refuse_blocked(self) -> None:
        if self.blocked:
            raise _output_error(self.blocked)

    def _put(self, path: str, name: str) -> None:
        fs, root, disk = self.opened
        if not disk:
            fs.put_file(path, f"{root}/{name}")
            return
        goal = f"{root}/{name}"
        parent, _, last = goal.rpartition("/")
        partial = f"{parent}/.{last}.partial-{secrets.token_hex(4)}"
        fs.makedirs(parent, exist_ok=True)
        try:
            fs.put_file(path, partial)
            fs.mv(partial, goal)
        except BaseException:
            with suppress(Exception):
                fs.rm_file(partial)
            raise

    def get(self, name: str, path: Path) -> None:
        """Download a file; FileNotFoundError if the store has none."""
        fs, root, _ = self.opened
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        try:
            self._tried("read", name, lambda: fs.get_file(f"{root}/{name}", str(partial)))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self.sent[name] = _mark(path)

    def read(self, name: str) -> bytes:
        """Get what a small file contains; FileNotFoundError if there is none, ValueError if it is not small."""
        fs, root, _ = self.opened
        fs.invalidate_cache()
        if self._tried("read", name, lambda: fs.info(f"{root}/{name}"))["size"] > SMALL:
            raise ValueError(f"{name} is too large")
        found: bytes = self._tried("read", name, lambda: fs.cat_file(f"{root}/{name}"))
        return found

    def overwrite(self, path: Path, name: str) -> None:
        """Upload a file, whatever the store has."""
        self._tried("write", name, lambda: self._put(str(path), name))

    def remove(self, name: str) -> None:
        """Delete a file, if there is one; on a disk also the folders that it leaves empty."""
        self._refuse_blocked()
        fs, root, disk = self.opened
        self.sent.pop(name, None)
        with suppress(FileNotFoundError):
            self._tried("delete", name, lambda: fs.rm_file(f"{root}/{name}"))
        while disk and "/" in name:
            name = name.rpartition("/")[0]
            try:
                fs.rmdir(f"{root}/{name}")
            except OSError:
                return

    def pull(self, run: str, folder: Path) -> None:
        """Download a run's folder as far as it got: what is finished, or its newest checkpoint; nothing if new."""
        there = f"{RUNS}/{run}/"
        inner = self._wanted([name.removeprefix(there) for name in self.names(f"{RUNS}/{run}")])
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if RUN in inner:
            for name in inner:
                self.get(there + name, partial / name)
            os.replace(partial, folder)

    def push(self, run: str, folder: Path, ended: bool = False) -> None:
        """Upload a run's folder: while it works whenever it has a new checkpoint, and when it has ended.

        `run.yaml` goes first and what says that something is whole goes last. Then the store's older files of the run
        are deleted: a run that goes on was downloaded before.
        """
        there = f"{RUNS}/{run}/"
        inner = self._wanted(_files(folder))
        states = [name for name in inner if WHOLE.fullmatch(name)]
        if not ended and all(there + name in self.sent for name in states):
            return
        old = [name for name in self.names(f"{RUNS}/{run}") if name.removeprefix(there) not in inner]
        old = [name for name in old if ended or name.startswith(there + CHECKPOINTS)]
        if there + RESULT in old:
            self.remove(there + RESULT)
        for name in sorted(inner, key=lambda name: (_turn(name), name)):
            self.put(folder / name, there + name)
        for name in sorted(old, key=lambda name: not name.endswith(STATE)):
            self.remove(name)

    def _wanted(self, inner: Iterable[str]) -> list[str]:
        """Get which files of a run are kept in the store: no older checkpoint, no result without its weights."""
        inner = list(inner)
        whole = [int(match[1]) for match in map(WHOLE.fullmatch, inner) if match]
        finished = RESULT in inner and any(name.startswith(WEIGHTS) for name in inner)
        kept = sorted(whole) if finished and self.everything else [] if finished else sorted(whole)[-1:]
        folders = tuple(f"{CHECKPOINTS}/checkpoint-{step}/" for step in kept)
        return [
            name
            for name in inner
            if (name != RESULT or finished)
            and (not name.startswith(f"{CHECKPOINTS}/checkpoint-") or name.startswith(folders))
        ]

    def _tried(self, verb: str, name: str, what: Callable[[], Any]) -> Any:
        """Get what a request returns; `OutputError` if it fails for good, FileNotFoundError as it is."""
        for wait in (*WAITS, None):
            try:
                return what()
            except FileNotFoundError:
                raise
            except Exception as error:
                if wait is None or isinstance(error, (PermissionError, NotImplementedError)):
                    raise self._refusal(f"{verb} {name}", error, "Repeat the command when it can") from None
                time.sleep(wait)

    def _refusal(self, asked: str, error: Exception, remedy: str) -> Exception:
        from spectune.errors import one_line

        return _output_error(f"{self.url}: cannot {asked}: {one_line(error)}. {remedy}.")


def _opened(url: str) -> tuple[Any, str]:
    """Get the file system of an address, and the path in it."""
    from spectune.errors import MissingExtraError, OptionError, one_line

    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None) or protocol
        raise MissingExtraError(f"{url}: cannot import {package}. Run: pip install {package}") from None
    except ValueError as error:
        raise OptionError(f"{url}: this address is unknown: {one_line(error)}. Check it, or give a folder.") from None
    except Exception as error:
        raise _output_error(
            f"{url}: cannot open it: {one_line(error)}. Check the address and the credentials."
        ) from None
    return found


def _output_error(words: str) -> Exception:
    from spectune.errors import OutputError

    return OutputError(words)


def _files(folder: Path) -> list[str]:
    """Get the names of a folder's files, without what is hidden or still being written."""
    found = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in files if not name.startswith(".")]
    return [path.relative_to(folder).as_posix() for path in found if not path.is_symlink()]


def _mark(path: Path) -> Any:
    about = path.stat()
    if about.st_size > SMALL:
        return about.st_size, about.st_mtime_ns
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _turn(name: str) -> int:
    return 0 if name == RUN else 3 if name == RESULT else 2 if WHOLE.fullmatch(name) else 1

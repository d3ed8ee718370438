"""`Store`: a sweep whose folder is in a store, such as s3://BUCKET/SWEEP: it works in a folder here, and uploads.

The store alone says what is done: the folder here begins empty, with the store's records, and is deleted at the end.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ..checkpoint import ADDRESS, hold_folder, refuse_address
from ..errors import OutputError
from ..runs.folder import CHECKPOINTS
from .claim import Claim
from .cluster import Cluster
from .remote import Remote
from .sweep_folder import RECORDS, RUNS, SweepFolder, not_kept
from .workers import Engine

EVERY = 10.0
"""Seconds between two looks for new checkpoints and pages; chosen, not measured."""
AT_ONCE = 8
"""Records that are downloaded at a time; chosen, not measured."""


def sweep_folder(output: str | Path | SweepFolder) -> SweepFolder:
    """Get the place of a sweep from a folder or from an address that fsspec reads."""
    if isinstance(output, SweepFolder):
        return output
    if isinstance(output, str) and ADDRESS.match(output) and "://" in output:
        return Store(output)
    refuse_address(output)
    return SweepFolder(Path(output))


class Store(SweepFolder):
    """A sweep in a store, and the folder here where it works."""

    def __init__(self, url: str) -> None:
        """Set the address; nothing is asked yet."""
        super().__init__(Path())
        self.said = url.rstrip("/")
        self.remote = Remote(self.said)
        last = re.sub(r"[^A-Za-z0-9_.-]", "-", self.said.rpartition("/")[2])
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.home = caches / "spectune" / "sweeps" / f"{last}-{sha256(self.said.encode()).hexdigest()[:12]}"
        self.claim = Claim(self.remote, self.home)
        self._far = False
        self._at_work = dict[str, threading.Lock]()
        self._changed = set[str]()  # runs that were at work
        self._shown, self._ended = threading.Event(), threading.Event()
        self._held = ExitStack()

    def _open(self) -> None:
        self.remote.check()
        self.home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(hold_folder(self.home))
            except OutputError as error:
                raise OutputError(f"{self.said}: its folder on this machine, {error}") from None
            for old in self.home.glob("work-*"):  # of a killed process; a run of it may still save there
                shutil.rmtree(old, ignore_errors=True)
            self.folder = self.home / f"work-{secrets.token_hex(4)}"
            self.folder.mkdir()
            held.callback(self.claim.leave)
            self.claim.take()
            self._there = self.remote.names()
            records = [name for name in self._there if re.fullmatch(rf"{RECORDS}/[^/]+\.json", name)]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self.remote.get(name, self.folder / name), records))
            self._thread = threading.Thread(target=self._upload, daemon=True)
            self._thread.start()
            self._held = held.pop_all()

    def _close(self, failed: bool) -> None:
        with self._held:
            self._ended.set()
            self._thread.join()
            if failed:
                with suppress(Exception):
                    self._put_pages()
            else:
                self._put_pages()
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def page(self) -> str:
        """The address of the page; empty without one."""
        return f"{self.said}/comparison.html" if super().page else ""

    def begin(self, keep: str, engine: Engine | None) -> None:
        """Upload what was asked; a cluster's nodes work through the store, if they can."""
        self.remote.everything = keep == "everything"
        if isinstance(engine, Cluster):
            engine.use_store(self.remote)
            self._far = True
        self._put_pages()

    @contextmanager
    def at_work(self, run: str) -> Iterator[None]:
        """Have the run here as far as it got, and upload its checkpoints, its folder and its record."""
        folder = self.folder / RUNS / run
        if not self._far and not folder.exists():
            self.remote.pull(run, folder)
        self._changed.add(run)
        if not self._far:
            self._at_work[run] = threading.Lock()
        try:
            yield
        finally:
            if not self._far:
                with self._at_work.pop(run):
                    self.remote.push(run, folder, ended=True)
            self.keep(f"{RUNS}/{run}.log")
            self.keep(f"{RECORDS}/{run}.json")

    def keep(self, name: str) -> None:
        """Upload a file, or delete it in the store if it is gone here."""
        if (self.folder / name).is_file():
            self.remote.put(self.folder / name, name)
        elif name in self._there or name in self.remote.sent:
            self.remote.remove(name)

    def show(self) -> None:
        """Upload tables and pages soon."""
        self._shown.set()

    def forget(self, run: str) -> None:
        """Delete all of a run, here and there."""
        super().forget(run)
        self._delete(run, ("",))

    def tidy(self, run: str, keep: str) -> None:
        """Delete what is not kept of a finished run, here and there."""
        super().tidy(run, keep)
        folders = [f"{name}/" for name in not_kept(keep)]
        self._delete(run, (*folders, *([] if keep == "everything" else [f"{CHECKPOINTS}/checkpoint-"])))

    def _delete(self, run: str, begins: tuple[str, ...]) -> None:
        there = f"{RUNS}/{run}/"
        for name in self.remote.names(there.rstrip("/")) if run in self._changed else self._there:
            if name.startswith(tuple(there + begin for begin in begins)):
                self.remote.remove(name)

    def _put_pages(self) -> None:
        for path in self.folder.rglob("*"):
            inner = path.relative_to(self.folder)
            if path.is_file() and inner.parts[0] not in (RECORDS, RUNS) and not inner.name.startswith("."):
                self.remote.put(path, inner.as_posix())

    def _upload(self) -> None:
        """Upload new checkpoints and pages while runs work; what fails is tried again, and once more at the end."""
        while not self._ended.wait(EVERY):
            for run, turn in list(self._at_work.items()):
                with turn, suppress(Exception):
                    if run in self._at_work:
                        self.remote.push(run, self.folder / RUNS / run)
            if self._shown.is_set():
                self._shown.clear()
                with suppress(Exception):
                    self._put_pages()

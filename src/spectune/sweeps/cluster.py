"""`Cluster`: what Ray and Slurm share: submits a run, follows its steps in the sweep's folder, cancels it."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..runs.result import RESULT_FILE
from .on_node import EVERY, Errand
from .remote import RUNS, Remote
from .worker import INTERRUPTED
from .workers import OnWorkerStep

RETRIES = 10
"""How often a run may lose its node; chosen, not measured: it continues from its last checkpoint each time."""
TAKEN_AWAY = (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
"""How a run ends that its cluster stopped, and not this sweep: it is started again."""
POLL = 0.5
"""Seconds between two looks at a run; chosen, not measured."""
HIDDEN = 120.0
"""Limit of seconds until another node's file is seen: NFS clients remember for up to 60 that a name was not there."""


class LostError(Exception):
    """A task that ended without doing its errand."""


class Cluster(ABC):
    """Runs on the nodes of a cluster that see the sweep's folder."""

    said: str
    """What the cluster is, and what each run gets of it."""

    def __init__(self, threads: int) -> None:
        """Set how many CPU threads a run has where OMP_NUM_THREADS does not say so."""
        self._threads = threads
        self._at_work: list[Any] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._store: Remote | None = None

    def use_store(self, store: Remote) -> None:
        """Work for a sweep in a store; `OptionError` for a cluster that needs a disk that its nodes share."""
        raise OptionError(
            f"{store.url}: this cluster works in a folder on a disk that its nodes share, not in a store. Give such a "
            f"folder with -o; stores work with --jobs and --on ray."
        )

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Refuse a sweep whose folder or package the nodes lack, before its first run; `OutputError` names a node."""

    @abstractmethod
    def submit(self, errand: Errand) -> Any:
        """Start a task."""

    @abstractmethod
    def ended(self, task: Any) -> bool:
        """Whether a task is over."""

    @abstractmethod
    def outcome(self, task: Any) -> tuple[int, Sequence[str]]:
        """Get what the errand of an ended task returned; `LostError` says in one line why there is nothing."""

    @abstractmethod
    def cancel(self, task: Any, at_once: bool) -> None:
        """Make a task save a checkpoint and end, or end at once."""

    def run(self, job: Path, log: Path, on_step: OnWorkerStep) -> int:
        """Run a job on a node, and get its exit status; KeyboardInterrupt if it was stopped."""
        told, steps = json.loads(job.read_text("utf-8")), job.with_suffix(".steps")
        awaited = [told["answer"], str(Path(told["folder"], RESULT_FILE))]
        errand = Errand(str(job.resolve()), str(Path.cwd()), self._threads, awaited)
        if self._store is not None:
            awaited = [f"{RUNS}/{job.stem}.answer", f"{RUNS}/{job.stem}/{RESULT_FILE}"]
            errand = replace(errand, awaited=awaited, told=json.dumps(told), store=self._store.afar())
        for _ in range(RETRIES):
            status = self._once(errand, steps, log, on_step)
            if status not in TAKEN_AWAY:
                break
        return status

    def _once(self, errand: Errand, steps: Path, log: Path, on_step: OnWorkerStep) -> int:
        with self._lock:  # none begins after `stop`
            if self._stopping:
                raise KeyboardInterrupt
            task = self.submit(errand)
            self._at_work.append(task)
        try:
            self._follow(task, steps, on_step)
            status = self._status(task, log)
        finally:
            with self._lock:
                self._at_work.remove(task)
            steps.unlink(missing_ok=True)
            if self._store is not None:
                self._store.remove(f"{RUNS}/{steps.name}")
        if self._stopping:
            raise KeyboardInterrupt
        return status

    def stop(self, *, at_once: bool = False) -> None:
        """Make every task save its checkpoint and end, or end at once; no other one begins."""
        with self._lock:
            self._stopping = True
            for task in self._at_work:
                self.cancel(task, at_once)

    def _follow(self, task: Any, steps: Path, on_step: OnWorkerStep) -> None:
        read, heard = 0, time.monotonic()
        while not self.ended(task):
            if self._store is not None and time.monotonic() - heard > EVERY:
                with suppress(OSError):  # nothing is told yet
                    self._store.get(f"{RUNS}/{steps.name}", steps)
                heard = time.monotonic()
            told, read = _told_since(steps, read)
            try:
                for line in told:
                    on_step(*line)
            except BaseException:
                self.cancel(task, at_once=False)
                while not self.ended(task):
                    time.sleep(POLL)
                raise
            time.sleep(POLL)

    def _status(self, task: Any, log: Path) -> int:
        try:
            status, written = self.outcome(task)
        except LostError as error:
            log.write_text(f"{error}\n", "utf-8")
            return 1
        if self._store is not None:
            _fetch(self._store, [f"{RUNS}/{log.name}", *written], log.parent.parent)
            return status
        deadline = time.monotonic() + HIDDEN
        while not all(Path(path).is_file() for path in written) and time.monotonic() < deadline:
            time.sleep(POLL)
        return status


@contextmanager
def token_in(place: Path | Remote) -> Iterator[str]:
    """Get the name of a new file in a folder or store, by which a node knows it again."""
    if isinstance(place, Remote):
        name = place.check(keep=True)
        try:
            yield name
        finally:
            place.remove(name)
        return
    token = place / f".seen-{uuid.uuid4().hex}"
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


def _fetch(store: Remote, names: Sequence[str], folder: Path) -> None:
    """Download what a node wrote; the store keeps the run's own files alone."""
    for name in names:
        with suppress(FileNotFoundError):
            store.get(name, folder / name)
        if name.endswith(".answer"):
            store.remove(name)


def _told_since(steps: Path, read: int) -> tuple[list[list[Any]], int]:
    """Get the validation losses and the last step of a file of steps after `read` bytes, and how far it is read now."""
    found: list[list[Any]] = []
    with suppress(OSError), steps.open("rb") as file:
        read = read if read <= file.seek(0, 2) else 0  # shorter where another node began it anew
        file.seek(read)
        whole = file.read().rpartition(b"\n")[0]
        read += len(whole) + bool(whole)
        for line in (line for line in whole.split(b"\n") if line.startswith(b"[")):
            with suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if len(line) > 3 or line is found[-1]], read

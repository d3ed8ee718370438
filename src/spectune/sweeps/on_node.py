"""`Errand`: one run of a sweep on a node of a cluster.

Only the standard library at the top: Ray and submitit send this file's code to the nodes, where the task stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .remote import RUNS, Remote

POLL = 0.1
"""Seconds between two looks at the process; chosen, not measured."""
EVERY = 5.0
"""Seconds between two uploads of steps and checkpoints; chosen, not measured."""


@dataclass
class Errand:
    """A job of `spectune.sweeps.worker`, done where this is called: get its exit status and the files that it wrote."""

    job: str
    """The file, absolute; the worker's steps and messages go into files beside it."""
    home: str
    """The folder where relative paths of the sweep begin."""
    threads: int
    awaited: list[str]
    """Files that a finished job has written."""
    store: Remote | None = None
    """Where the sweep is in a store, which this node reaches, and not on a disk that it sees."""
    told: str = ""
    """Then, the content of the job's file."""
    process: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> tuple[int, list[str]]:
        """Work until the run ends; an interrupt makes it save a checkpoint first."""
        if self.store is not None:
            return self._from_store(self.store)
        return self._work(Path(self.job), self.home), [path for path in self.awaited if os.path.isfile(path)]

    def _work(self, job: Path, home: str, look: Callable[[], None] = lambda: None) -> int:
        with job.with_suffix(".log").open("wb") as log, job.with_suffix(".steps").open("wb") as steps:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spectune.sweeps.worker", str(job)],
                stdin=subprocess.PIPE,
                stdout=steps,
                stderr=log,
                cwd=home,
                env={"OMP_NUM_THREADS": str(self.threads), **os.environ},
                start_new_session=True,
            )
            try:
                while self.process.poll() is None:
                    time.sleep(POLL)
                    look()
            finally:
                self.end()
        status: int = self.process.returncode
        return status

    def _from_store(self, store: Remote) -> tuple[int, list[str]]:
        """Work in a folder of this node, and upload what the run says and saves."""
        name = Path(self.job).stem
        with tempfile.TemporaryDirectory(prefix="spectune-", ignore_cleanup_errors=True) as here:
            run, job = Path(here, name), Path(here, f"{name}.job")
            answer = job.with_suffix(".answer")
            store.pull(name, run)
            job.write_text(json.dumps(json.loads(self.told) | {"folder": str(run), "answer": str(answer)}), "utf-8")
            try:
                home = self.home if os.path.isdir(self.home) else here  # without relative paths, any will do
                status = self._work(job, home, _looking(store, name, run))
            finally:
                store.push(name, run, ended=True)
                for path in (job.with_suffix(".log"), answer):
                    if path.is_file():
                        store.put(path, f"{RUNS}/{path.name}")
        return status, [name for name in self.awaited if name in store.sent]

    def end(self) -> None:
        """Have the process save a checkpoint, and wait for it: it ends when its stdin does."""
        self.process.stdin.close()
        self.process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit before Slurm takes the node away: save, and queue the same job once more."""
        from submitit.helpers import DelayedSubmission

        self.end()
        return DelayedSubmission(replace(self))


def work(errand: Errand) -> tuple[int, list[str]]:
    """Do an errand."""
    return errand()


def _looking(store: Remote, name: str, run: Path) -> Callable[[], None]:
    """Get what uploads a run's steps and its new checkpoint, from time to time."""
    last = [time.monotonic()]

    def look() -> None:
        if time.monotonic() - last[0] < EVERY:
            return
        last[0] = time.monotonic()
        with suppress(Exception):  # tried again next time, and at the end
            store.push(name, run)
            store.put(run.with_name(f"{name}.steps"), f"{RUNS}/{name}.steps")

    return look


def obstacle(folder: str, token: str, home: str, version: str, store: Remote | None = None) -> str:
    """Get why this node cannot work for a sweep; empty if it can."""
    if store is None and (unseen := _unseen(folder, token, home)):
        return unseen
    try:
        from spectune import __version__ as here
    except ImportError as error:
        return f"cannot import spectune ({error}). Install it for {sys.executable}"
    if here != version:
        return f"has spectune {here}, the command has {version}. Install the same"
    if store is not None:
        try:
            store.check(token)
            store.check()
        except Exception as error:
            return f"does not reach the store: {error}".rstrip(".")
    return ""


def _unseen(folder: str, token: str, home: str) -> str:
    if not Path(folder, token).is_file():
        return f"cannot see {folder}. Choose a folder (-o) on a disk that all nodes share"
    if not os.access(folder, os.W_OK):
        return f"cannot write into {folder}. Let its user write there"
    if not os.path.isdir(home):
        return (
            f"cannot see {home}, where the sweep's relative paths begin. Run the command on a disk that all nodes share"
        )
    return ""

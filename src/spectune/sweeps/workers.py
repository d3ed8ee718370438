"""`Workers`: jobs in their own processes: reports their steps, passes Ctrl-C on, keeps their last output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO

OnWorkerStep = Callable[..., None]
"""Called with (step, steps, loss or None), or (step, steps, None, validation loss). What it raises ends the run."""


class Engine(Protocol):
    """Where the runs of a sweep work."""

    def prepare(self, folder: Path) -> None:
        """Refuse what would keep every run from working; called once, before the first."""

    def run(self, job: Path, log: Path, on_step: OnWorkerStep) -> int:
        """Run a job in its own process, and get its exit status; KeyboardInterrupt if it was stopped."""

    def stop(self, *, at_once: bool = False) -> None:
        """Make every run save its checkpoint and end, or end at once; no other one begins."""


class Workers:
    """The running processes of a sweep on this machine."""

    def __init__(self, jobs: int = 1) -> None:
        """Set how many work at the same time; each gets its share of the cores."""
        self._environment = dict(os.environ)
        if jobs > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
        self._at_work = set[subprocess.Popen[str]]()
        self._lock = threading.Lock()
        self._stopping = False

    def prepare(self, folder: Path) -> None:
        """This machine has the folder."""

    def run(self, job: Path, log: Path, on_step: OnWorkerStep) -> int:
        """Run a job in its own process, and get its exit status; KeyboardInterrupt if it was stopped."""
        with log.open("w", encoding="utf-8") as stderr:
            process = self._start(job, stderr)
            assert process.stdout is not None and process.stdin is not None
            try:
                for line in process.stdout:
                    if line.startswith("["):
                        on_step(*json.loads(line))
                status = process.wait()
            except BaseException:  # from on_step
                _end(process)
                process.wait()
                raise
            finally:
                with self._lock:
                    self._at_work.discard(process)
                process.stdin.close()
                process.stdout.close()
        if self._stopping:
            raise KeyboardInterrupt
        return status

    def _start(self, job: Path, stderr: TextIO) -> subprocess.Popen[str]:
        with self._lock:  # none begins after `stop`
            if self._stopping:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", "spectune.sweeps.worker", str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._environment,
                # A terminal's Ctrl-C would reach it, too, and a second one ends it at once, without a checkpoint.
                start_new_session=True,
            )
            self._at_work.add(process)
            return process

    def stop(self, *, at_once: bool = False) -> None:
        """Make every process save its checkpoint and end, or end at once; no other one begins."""
        with self._lock:
            self._stopping = True
            for process in self._at_work:
                if at_once:
                    process.kill()
                else:
                    _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Have a process save its checkpoint and end.

    By the end of its stdin, not by a signal: a sweep in the background ignores SIGINT, and so does its process until
    Python is up; the end of a file waits.
    """
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


@contextmanager
def plain_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt once each: runs may need long to save their checkpoints.

    Otherwise the command line would raise a second one. Only the main thread handles signals; an ignored Ctrl-C (in a
    shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        for kind, handler in before.items():
            if kind is signal.SIGTERM or handler is not signal.SIG_IGN:
                signal.signal(kind, signal.default_int_handler)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_words(status: int, log: Path) -> str:
    """Get in one line why a process ended without an answer."""
    if status < 0:
        return f"the process was killed by signal {-status}" + (" (out of memory?)" if status == -9 else "") + "."
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {status}: {lines[-1][:500] if lines else 'no message'}"

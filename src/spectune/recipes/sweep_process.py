"""`launch`: a job in a process of its own, its steps heard, Ctrl-C passed on, its last words kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

OnStep = Callable[[int, int, "float | None"], None]
"""Called with (step, steps, loss or None)."""


def launch(job: Path, log: Path, on_step: OnStep) -> int:
    """Run a job in a process of its own, and get its exit status.

    Ctrl-C and SIGTERM are passed on once, and the process is waited for: it saves its checkpoint first.
    """
    command = [sys.executable, "-m", "spectune.recipes.sweep_worker", str(job)]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # A terminal's Ctrl-C would reach it too, and twice is at once: without a checkpoint.
            start_new_session=True,
        )
        assert process.stdout is not None and process.stdin is not None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if _is_main_thread() else None
        try:
            for line in process.stdout:
                if line.startswith("["):
                    on_step(*json.loads(line))
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdin.close()
            process.stdout.close()
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def last_words(status: int, log: Path) -> str:
    """Get why a process without an answer ended, in one line."""
    if status < 0:
        return f"the process was ended by signal {-status}" + (" (out of memory?)" if status == -9 else "") + "."
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {status}: {lines[-1][:500] if lines else 'no message'}"

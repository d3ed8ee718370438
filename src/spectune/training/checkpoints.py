"""Runs that survive: checkpoints are complete or absent, and Ctrl-C saves before it ends the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from ..checkpoint import sync_tree
from ..errors import OutputError
from .processes import anywhere

PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
# Examples in one optimizer step, over all processes: must stay the same when a run moves to more or fewer of them.
STEP_FILE = "step.json"
# Everything is written here first; leftovers of a killed process are deleted when the next checkpoint is saved.
PARTIAL = ".partial"


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, saved its checkpoint and stopped; `--resume` continues it."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, step)  # pickle rebuilds an exception from these
        self.folder, self.step = folder, step

    def __str__(self) -> str:
        return f"stopped at step {self.step}, which is saved in {self.folder}. Continue with --resume."


class OwnCheckpoints:
    """A model that writes and reads its checkpoints itself, such as one with several parts."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write what is trained, and any other state that the next steps depend on."""
        raise NotImplementedError

    def load_checkpoint(self, folder: Path) -> None:
        """Load what `save_checkpoint` wrote."""
        raise NotImplementedError


@dataclass
class StopRequest:
    """Whether the run was asked to stop."""

    asked: bool = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Get a request that SIGINT (Ctrl-C) or SIGTERM (a scheduler) sets; a second signal ends the process at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.asked = True
        restore()

    for kind in before:
        signal.signal(kind, ask)
    try:
        yield request
    finally:
        restore()


class StopWhenAsked(TrainerCallback):
    """Saves and ends the loop after the step in which any process was asked to stop.

    A scheduler may signal only one process, or all of them in different steps; they must save the same step.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.request.asked = anywhere(self.request.asked)
        if self.request.asked:
            control.should_save = control.should_training_stop = True


def checkpoints(folder: Path) -> list[Path]:
    """Get the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    whole = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix(PREFIX)))


def steps_done(checkpoint: Path) -> int:
    """Get the number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """Get the log up to a checkpoint."""
    read: list[dict[str, Any]] = json.loads((checkpoint / STATE_FILE).read_text())["log_history"]
    return read


def write_examples_a_step(checkpoint: Path, examples: int) -> None:
    """Store in a checkpoint how many examples one optimizer step of its run has."""
    (checkpoint / STEP_FILE).write_text(json.dumps({"examples": examples}) + "\n")


def examples_a_step(checkpoint: Path) -> int | None:
    """Get how many examples one optimizer step of a checkpoint's run has, over all processes; None if unknown."""
    try:
        found = json.loads((checkpoint / STEP_FILE).read_text())["examples"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) else None


def save_whole(
    folder: Path, name: str, write: Callable[[], None], keep: int, wait: Callable[[], None], main: bool
) -> None:
    """Let `write` fill `folder/.partial/name`, rename it in one step, and delete all but the newest `keep`.

    Every process of a distributed run calls this; `wait` is their barrier, `main` is true in one of them. A full
    disk is an `OutputError`; the earlier checkpoints stay as they are.
    """
    partial, goal = folder / PARTIAL, folder / name
    if main:
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    try:
        write()
        wait()
        if main:
            sync_tree(partial / name)
            if goal.exists():
                os.replace(goal, partial / f"old-{name}")
            os.replace(partial / name, goal)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.
        shutil.rmtree(partial, ignore_errors=True)
        last = next(iter(reversed(checkpoints(folder))), None)
        kept = f"the last complete one is {last.name}" if last else "there is no earlier one"
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        reason = (getattr(error, "strerror", None) or str(error).split("\n")[0]).rstrip(".")
        raise OutputError(
            f"{goal}: cannot write the checkpoint: {reason}; {kept}. {free:,} bytes are free; make room and continue "
            f"with --resume."
        ) from error
    if main:
        for old in checkpoints(folder)[:-keep]:
            with suppress(OSError):  # renamed first, since half a deleted one could be mistaken for a complete one
                os.replace(old, partial / old.name)
        clear_partial(folder)


def clear_partial(folder: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)

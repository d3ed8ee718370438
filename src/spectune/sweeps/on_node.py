"""`Errand`: one run of a sweep on a node of a cluster.

Only the standard library at the top: Ray and submitit send this file's code to the nodes, where the task stays small.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

POLL = 0.1
"""Seconds between two looks at the process; chosen, not measured."""


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
    process: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> tuple[int, list[str]]:
        """Work until the run ends; an interrupt makes it save a checkpoint first."""
        job = Path(self.job)
        with job.with_suffix(".log").open("wb") as log, job.with_suffix(".steps").open("wb") as steps:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spectune.sweeps.worker", self.job],
                stdin=subprocess.PIPE,
                stdout=steps,
                stderr=log,
                cwd=self.home,
                env={"OMP_NUM_THREADS": str(self.threads), **os.environ},
                start_new_session=True,
            )
            try:
                while self.process.poll() is None:
                    time.sleep(POLL)
            finally:
                self.end()
        return self.process.returncode, [path for path in self.awaited if os.path.isfile(path)]

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


def obstacle(folder: str, token: str, home: str, version: str) -> str:
    """Get why this node cannot work for a sweep; empty if it can."""
    seen = Path(folder, token)
    if not seen.is_file():
        return f"cannot see {folder}. Choose a folder (-o) on a disk that all nodes share"
    if not os.access(folder, os.W_OK):
        return f"cannot write into {folder}. Let its user write there"
    if not os.path.isdir(home):
        return (
            f"cannot see {home}, where the sweep's relative paths begin. Run the command on a disk that all nodes share"
        )
    try:
        from spectune import __version__ as here
    except ImportError as error:
        return f"cannot import spectune ({error}). Install it for {sys.executable}"
    if here != version:
        return f"has spectune {here}, the command has {version}. Install the same"
    return ""

"""`SweepFolder`: where the files of a sweep are; on this machine's disk nothing has to be done for them.

sweep.json           what was asked                       runs/NAME/     the run's folder, as `spectune train` has it
records/NAME.json    one run: figures, machine, versions, commit, seed; or the one-line error of a failed one
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoint.run_folder import ADAPTER, MODEL
from ..runs.folder import CHECKPOINTS
from .workers import Engine

RECORDS, RUNS, ASKED = "records", "runs", "sweep.json"


class SweepFolder:
    """The folder of a sweep. Enter it to work there; it can be entered again inside."""

    def __init__(self, folder: Path) -> None:
        """Set the folder on this machine that all files are written into."""
        self.folder, self.said = folder, str(folder)
        self._entered = 0

    def __enter__(self) -> SweepFolder:
        self._entered += 1
        if self._entered == 1:
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._close(failed=kind is not None)

    def _open(self) -> None:
        """Make the folder ready."""

    def _close(self, failed: bool) -> None:
        """Leave nothing open."""

    @property
    def page(self) -> str:
        """The address of the page; empty without one."""
        page = self.folder / "comparison.html"
        return page.resolve().as_uri() if page.is_file() else ""

    def begin(self, keep: str, engine: Engine | None) -> None:
        """Take what the sweep keeps of a finished run, and where its runs work; called once, before the first."""

    @contextmanager
    def at_work(self, run: str) -> Iterator[None]:
        """Have a run's folder ready, and keep what is written for the run until the block ends."""
        yield

    def keep(self, name: str) -> None:
        """Keep a file of the sweep that was written again."""

    def show(self) -> None:
        """Keep tables and pages, which were written again."""

    def forget(self, run: str) -> None:
        """Delete all of a run."""
        shutil.rmtree(self.folder / RUNS / run, ignore_errors=True)

    def tidy(self, run: str, keep: str) -> None:
        """Delete what is not kept of a finished run; the record has the figures, and files of trackers stay."""
        run_folder = self.folder / RUNS / run
        for name in not_kept(keep):
            shutil.rmtree(run_folder / name, ignore_errors=True)
        if keep != "everything":
            for checkpoint in (run_folder / CHECKPOINTS).glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            with suppress(OSError):  # not empty if a tracker writes into it
                (run_folder / CHECKPOINTS).rmdir()


def not_kept(keep: str) -> tuple[str, ...]:
    """Get the folders of weights that are deleted of a finished run."""
    return {"nothing": (MODEL, ADAPTER), "adapters": (MODEL,), "everything": ()}[keep]

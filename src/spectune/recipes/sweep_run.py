"""`run_sweep`: every run of a sweep in its own process, one JSON for each, from where it was stopped.

sweep.json           what was asked                       runs/NAME/     the run's folder, as `spectune train` has it
records/NAME.json    one run: figures, machine, versions, commit, seed; or the one-line error of a failed one
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint import hold_folder, write_atomically
from ..errors import OutputError
from .rates import method_of
from .runs import ADAPTER, CHECKPOINTS, MODEL, RESULT_FILE, RunResult
from .sweep import Cell, SweepConfig, cells, require_splits
from .sweep_choice import chosen_rate
from .sweep_process import OnStep, last_words, launch
from .sweep_record import SweepRecord, read_record

RECORDS, RUNS, ASKED = "records", "runs", "sweep.json"


class OnRun(Protocol):
    """Called before a run and for each of its steps, with its place, the number of runs, and its name."""

    def __call__(self, done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None: ...


def run_sweep(
    sweep: SweepConfig, output_dir: str | Path, *, provenance: Mapping[str, Any], on_run: OnRun | None = None
) -> list[SweepRecord]:
    """Get the record of every run; what was finished before is read, a failed run is tried once more.

    `provenance` (versions, machine, commit) is put into every record. `OutputError` where the folder holds the same
    runs told otherwise, `DataError` where a task has no validation or test examples; KeyboardInterrupt after Ctrl-C,
    when the run at work has saved its checkpoint: call it again and it goes on.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: asked for an output folder, found a file. Choose another folder.")
    require_splits(sweep)
    try:
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        (folder / RUNS).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be created: {error.strerror}.") from error
    with hold_folder(folder):
        write_atomically(folder / ASKED, json.dumps(sweep.model_dump(mode="json"), indent=1) + "\n")
        return _run_all(sweep, folder, provenance, on_run)


def _run_all(
    sweep: SweepConfig, folder: Path, provenance: Mapping[str, Any], on_run: OnRun | None
) -> list[SweepRecord]:
    running = _Running(sweep, folder, provenance, on_run, _count(sweep))
    first, rest = sweep.seeds[: sweep.tuning_seeds], sweep.seeds[len(sweep.seeds[: sweep.tuning_seeds]) :]
    for task in sweep.tasks:
        for method in sweep.methods:
            tuning = [running.once(cell) for cell in cells(sweep, task, method, first)]
            rate = chosen_rate(tuning, sweep.metric)
            for cell in cells(sweep, task, method, rest):
                if cell.rate == rate:
                    running.once(cell)
    return running.found


def _count(sweep: SweepConfig) -> int:
    first = len(sweep.seeds[: sweep.tuning_seeds])
    rest = len(sweep.seeds) - first
    return len(sweep.tasks) * sum(len(m.learning_rates) * first + rest for m in sweep.methods.values())


@dataclass
class _Running:
    """A sweep at work, and the records so far."""

    sweep: SweepConfig
    folder: Path
    provenance: Mapping[str, Any]
    on_run: OnRun | None
    runs: int
    found: list[SweepRecord] = field(default_factory=list)

    def once(self, cell: Cell) -> SweepRecord:
        """Get the record of a run, done now or read."""
        record = self._old(cell) or self._new(cell)
        self.found.append(record)
        return record

    def _old(self, cell: Cell) -> SweepRecord | None:
        path = self.folder / RECORDS / f"{cell.name}.json"
        old = read_record(path) if path.is_file() else None
        if old is not None and old.config != cell.config.plain():
            raise OutputError(
                f"{path}: asked to continue, but this run was told otherwise before. Give the same sweep, or choose "
                f"another folder."
            )
        lacks = self.sweep.forgetting is not None and old is not None and old.general_loss is None
        return old if old is not None and old.ok and not lacks else None

    def _new(self, cell: Cell) -> SweepRecord:
        place, run_folder = len(self.found), self.folder / RUNS / cell.name

        def on_step(step: int, steps: int, loss: float | None) -> None:
            if self.on_run is not None:
                self.on_run(place, self.runs, cell.name, step, steps, loss)

        on_step(0, 0, None)
        if not (run_folder / ADAPTER).is_dir() and not (run_folder / MODEL).is_dir():
            # Its weights were deleted, and now something is asked of them: train them again.
            (run_folder / RESULT_FILE).unlink(missing_ok=True)
        record = _finished(cell, run_folder, self._work(cell, run_folder, on_step), self.provenance)
        record.write(self.folder / RECORDS / f"{cell.name}.json")
        if record.ok:
            _tidy(run_folder, self.sweep.keep)
        return record

    def _work(self, cell: Cell, run_folder: Path, on_step: OnStep) -> dict[str, Any]:
        asked = self.sweep.forgetting
        # The base model's loss is the same for every method and seed of a task.
        known = [r.general_loss_base for r in self.found if r.task == cell.task and r.general_loss_base is not None]
        job, answer, log = (run_folder.with_name(f"{cell.name}.{end}") for end in ("job", "answer", "log"))
        told = {
            "config": cell.config.plain(),
            "folder": str(run_folder.resolve()),
            "answer": str(answer.resolve()),
            "forgetting": None if asked is None else asked.model_dump(mode="json"),
            "base_loss": known[0] if known else None,
        }
        answer.unlink(missing_ok=True)
        write_atomically(job, json.dumps(told))
        status = launch(job, log, on_step)
        answered = answer.is_file()
        found: dict[str, Any] = (
            json.loads(answer.read_text("utf-8")) if answered else {"error": last_words(status, log)}
        )
        for path in (job, answer, *([log] if answered else [])):
            path.unlink(missing_ok=True)
        return found


def _finished(cell: Cell, run_folder: Path, answer: dict[str, Any], provenance: Mapping[str, Any]) -> SweepRecord:
    common: dict[str, Any] = {
        "task": cell.task,
        "method": cell.method,
        "kind": method_of(cell.config),
        "rate": cell.rate,
        "seed": cell.seed,
        "config": cell.config.plain(),
        "seconds": float(answer.get("seconds", 0.0)),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "provenance": dict(provenance),
    }
    if "error" in answer or not (run_folder / RESULT_FILE).is_file():
        return SweepRecord(**common, status="failed", error=str(answer.get("error", "no result was written")))
    result = RunResult.read(run_folder)
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    same = ("metrics", "steps", "trainable", "head", "total", "step_seconds", "peak_bytes", "file_bytes", "device")
    return SweepRecord(
        **common,
        status="success",
        final_loss=sum(tail) / len(tail) if tail else None,
        **{name: getattr(result, name) for name in same},
        general_loss=answer.get("general_loss"),
        general_loss_base=answer.get("general_loss_base"),
    )


def _tidy(run_folder: Path, keep: str) -> None:
    """Delete what is not to stay; the figures stand in the record."""
    goes = {"nothing": (CHECKPOINTS, MODEL, ADAPTER), "adapters": (CHECKPOINTS, MODEL), "everything": ()}[keep]
    for name in goes:
        shutil.rmtree(run_folder / name, ignore_errors=True)

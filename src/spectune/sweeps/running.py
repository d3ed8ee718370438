"""`Running`: a sweep while it runs: which runs come next, which are read, and what one is asked and answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, Protocol

from ..checkpoint import write_atomically
from ..checkpoint.run_folder import ADAPTER, MODEL
from ..errors import OutputError
from ..runs.folder import differences
from ..runs.result import RESULT_FILE
from .choice import chosen_rate, rate_beyond
from .config import Cell, SweepConfig, cells
from .halving import Halving, StoppedEarly, Trial
from .record import SweepRecord, as_now, finished, read_record, same_base
from .summary import REPORTED
from .sweep_folder import RECORDS, RUNS, SweepFolder
from .workers import Engine, OnWorkerStep, Workers, last_words

CHOOSING = ("validation",)
"""What a rate is chosen on; the rest is measured at the chosen rate alone."""

OnRecord = Callable[[list[SweepRecord], int], None]


class OnRun(Protocol):
    """Called before a run and for each of its steps, with its place, the number of runs, and its name."""

    def __call__(self, done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None: ...


@dataclass
class Running:
    """A running sweep, and the records so far."""

    sweep: SweepConfig
    place: SweepFolder
    provenance: Mapping[str, Any]
    on_run: OnRun | None
    on_record: OnRecord | None
    asked: int | None
    engine: Engine | None
    halving: Halving | None = None
    found: dict[str, SweepRecord] = field(default_factory=dict)
    """Name of the run -> its record."""
    turn: Any = field(default_factory=Lock)

    def __post_init__(self) -> None:
        sweep, seeds, self.folder = self.sweep, len(self.sweep.seeds), self.place.folder
        self.first = len(sweep.seeds[: sweep.tuning_seeds])
        rates = [len(method.rates(task)) for method in sweep.methods.values() for task in sweep.tasks]
        self.runs = sum(count * self.first + seeds - self.first for count in rates)
        self.jobs = min(self.runs, self.asked or (1 if self.engine is None else self.runs))
        self.workers: Engine = self.engine or Workers(self.jobs)
        self.slots = Semaphore(self.jobs)
        if self.halving is not None:
            self.halving.jobs = self.jobs

    def line(self, task: str, method: str) -> list[SweepRecord]:
        """Get the records of one method on one task: the first seeds try all rates, the others only the chosen one."""
        sweep, rates = self.sweep, self.sweep.methods[method].rates(task)
        tried = self._tried(task, method, rates, CHOOSING if len(rates) > 1 else None)
        for _ in range(sweep.grow):
            further = rate_beyond(rates, chosen_rate(self._records(tried), sweep.metric))
            if further is None:
                break
            rates.append(further)
            self.runs += self.first
            tried += self._tried(task, method, [further], CHOOSING)
        rate, stopped = chosen_rate(self._records(tried), sweep.metric), self._stopped(tried)
        if rate is None and stopped:  # what was better failed later
            self.runs += len(stopped) * (self.first - 1)
            tried += self._tried(task, method, stopped, CHOOSING, whole=True)
            rate = chosen_rate(self._records(tried), sweep.metric)
        best = [cell for cell in tried if cell.rate == rate]
        untried = cells(sweep, task, method, [] if rate is None else [rate], sweep.seeds[self.first :])
        self._at_once([partial(self.scored, cell) for cell in best] + [partial(self.once, c, None) for c in untried])
        for cell in [*tried, *untried]:
            if self.found[cell.name].ok or self.found[cell.name].stopped:
                self.place.tidy(cell.name, sweep.keep)
        return self._records([*tried, *untried])

    def _tried(
        self, task: str, method: str, rates: Sequence[float], measures: Sequence[str] | None, whole: bool = False
    ) -> list[Cell]:
        """Try rates with the first seeds; one that is stopped with the first of them is not tried with the others."""
        sweep, halving = self.sweep, None if whole or measures is None else self.halving
        asked = cells(sweep, task, method, rates, sweep.seeds[: self.first if halving is None else 1])
        self._at_once(
            [partial(self.once, cell, measures, None if halving is None else halving.trial(cell)) for cell in asked]
        )
        if halving is None:
            return asked
        stopped = self._stopped(asked)
        self.runs -= len(stopped) * (self.first - 1)
        left = [rate for rate in rates if rate not in stopped]
        others = cells(sweep, task, method, left, sweep.seeds[1 : self.first])
        self._at_once([partial(self.once, cell, measures) for cell in others])
        return asked + others

    def _records(self, tried: Sequence[Cell]) -> list[SweepRecord]:
        return [self.found[name] for name in dict.fromkeys(cell.name for cell in tried)]

    def _stopped(self, tried: Sequence[Cell]) -> list[float]:
        return [record.rate for record in self._records(tried) if record.stopped]

    def _at_once(self, asked: Sequence[Callable[[], SweepRecord]]) -> list[SweepRecord]:
        """Get the records of runs that do not wait for each other."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(pool.map(lambda one: one(), asked))
            except BaseException:
                self.workers.stop()  # before the pool waits for the others
                raise

    def once(self, cell: Cell, measures: Sequence[str] | None, trial: Trial | None = None) -> SweepRecord:
        """Get the record of a run, done now or read; with a trial it may be one that was stopped early."""
        old = self._old(cell)
        record = self._new(cell, measures, trial) if old is None or (old.stopped and trial is None) else old
        if trial is not None:
            trial.read(record)
        return self._heard(cell, record)

    def scored(self, cell: Cell) -> SweepRecord:
        """Get the record of a run at the chosen rate, with its figures on test."""
        record = self.found[cell.name]
        if not record.ok or record.error or any(part in record.metrics for part in REPORTED):
            return record
        scored = self._new(cell, None)
        if not scored.ok:  # its figures on validation were good, and the choice stands
            scored = record.model_copy(update={"error": scored.error})
            scored.write(self.folder / RECORDS / f"{cell.name}.json")
            self.place.keep(f"{RECORDS}/{cell.name}.json")
        return self._heard(cell, scored)

    def _heard(self, cell: Cell, record: SweepRecord) -> SweepRecord:
        with self.turn:
            self.found[cell.name] = record
            if self.on_record is not None:
                self.on_record(list(self.found.values()), self.runs)
        return record

    def _old(self, cell: Cell) -> SweepRecord | None:
        path = self.folder / RECORDS / f"{cell.name}.json"
        try:
            old = read_record(path) if path.is_file() else None
        except OutputError as error:  # of a store the user knows the address, and not the copy on this disk
            raise OutputError(str(error).replace(str(self.folder), self.place.said)) from None
        changes = [] if old is None else differences(as_now(old.config), cell.config.plain())
        if old is not None and old.error and not old.ok and changes:
            self.place.forget(cell.name)  # the mistake was corrected
        elif changes:
            different = ", ".join(changes[:3])
            raise OutputError(
                f"{self.place.said}/{RECORDS}/{path.name}: this run has another configuration: {different}. Give the "
                f"same sweep, or choose another folder."
            )
        lacks = self.sweep.forgetting is not None and old is not None and old.general_loss is None
        if old is not None and (old.stopped or old.diverged) and not changes:
            return old  # it would end so again
        return old if old is not None and old.ok and not old.error and not lacks else None

    def _new(self, cell: Cell, measures: Sequence[str] | None, trial: Trial | None = None) -> SweepRecord:
        run_folder = self.folder / RUNS / cell.name

        def on_step(step: int, steps: int, loss: float | None, validation: float | None = None) -> None:
            if validation is not None:
                if trial is not None:
                    trial.told(step, steps, validation)
            elif self.on_run is not None:
                self.on_run(done, self.runs, cell.name, step, steps, loss)

        with self.slots, self.place.at_work(cell.name):
            done = len(self.found)
            on_step(0, 0, None)
            if not (run_folder / ADAPTER).is_dir() and not (run_folder / MODEL).is_dir():
                # Its deleted weights are needed now: train them again.
                (run_folder / RESULT_FILE).unlink(missing_ok=True)
            answer = self._work(cell, run_folder, measures, on_step)
            record = finished(cell, run_folder, answer, self.provenance, self.jobs)
            record.write(self.folder / RECORDS / f"{cell.name}.json")
        return record

    def _work(
        self, cell: Cell, run_folder: Path, measures: Sequence[str] | None, on_step: OnWorkerStep
    ) -> dict[str, Any]:
        asked = self.sweep.forgetting
        # The base model's loss is the same for every run that begins with the same model.
        known = [
            r.general_loss_base
            for r in list(self.found.values())
            if r.general_loss_base is not None and same_base(r, cell)
        ]
        job, answer, log = (run_folder.with_name(f"{cell.name}.{end}") for end in ("job", "answer", "log"))
        told = {
            "config": cell.config.plain(),
            "folder": str(run_folder.resolve()),
            "answer": str(answer.resolve()),
            "forgetting": None if asked is None else asked.model_dump(mode="json"),
            "base_loss": known[0] if known else None,
            "measures": measures,
        }
        answer.unlink(missing_ok=True)
        write_atomically(job, json.dumps(told))
        found: dict[str, Any]
        begun = time.monotonic()
        try:
            status = self.workers.run(job, log, on_step)
            found = json.loads(answer.read_text("utf-8")) if answer.is_file() else {"error": last_words(status, log)}
        except StoppedEarly as early:
            # Of a cluster nothing is known: neither how long the run waited there, nor which node had it.
            cost: dict[str, Any] = {"seconds": time.monotonic() - begun} if self.engine is None else {"machine": {}}
            found = {"stopped": early.args[0], **cost}
        for path in (job, answer, *([log] if "seconds" in found or "stopped" in found else [])):
            path.unlink(missing_ok=True)
        return found

"""`run_sweep`: every run of a sweep in its own process, with one JSON file each; continues where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..checkpoint import hold_folder, write_atomically
from ..errors import OutputError
from .config import SweepConfig, require_splits
from .halving import Halving
from .record import SweepRecord
from .running import OnRecord, OnRun, Running
from .store import sweep_folder
from .sweep_folder import ASKED, RECORDS, RUNS, SweepFolder
from .workers import Engine, plain_ctrl_c


def run_sweep(
    sweep: SweepConfig,
    output_dir: str | Path | SweepFolder,
    *,
    provenance: Mapping[str, Any],
    on_run: OnRun | None = None,
    on_record: OnRecord | None = None,
    jobs: int | None = None,
    engine: Engine | None = None,
) -> list[SweepRecord]:
    """Get the record of every run; finished ones are read, failed ones are tried again.

    A rate is chosen on validation; only then, and at that rate alone, is anything measured on test or by lm-eval.
    `on_record` is called with all records so far, and how many there will be, whenever there is another one.

    `output_dir` is a folder, or as text the address of a store that fsspec reaches, such as s3://BUCKET/SWEEP.
    `provenance` (versions, machine, commit) is put into every record. `jobs` runs work at the same time (default: one),
    each with its share of the cores (unless OMP_NUM_THREADS is set); `on_run` is called from their threads. With an
    `engine` (`connect`) they work on its cluster, by default all that do not wait for another's result.

    `OutputError` if the folder contains the same runs with another configuration or the store cannot be written,
    `DataError` if a task has no validation or test examples, `OptionError` if `stop` could stop nothing or the engine
    cannot reach a store, `MissingExtraError` if a package is missing; KeyboardInterrupt after Ctrl-C, when all runs
    have saved their checkpoints: call it again to continue.
    """
    found = sweep_folder(output_dir)
    folder = found.folder
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: an output folder is needed, but this is a file. Choose another folder.")
    require_splits(sweep)
    halving = None if sweep.stop is None else Halving(sweep)
    with found as place:
        folder = place.folder
        try:
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
            (folder / RUNS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot create this folder: {error.strerror}. Choose another one.") from error
        with hold_folder(folder), plain_ctrl_c():
            write_atomically(folder / ASKED, json.dumps(sweep.model_dump(mode="json"), indent=1) + "\n")
            place.begin(sweep.keep, engine)
            running = Running(sweep, place, provenance, on_run, on_record, jobs, engine, halving)
            running.workers.prepare(folder)
            return _run_all(running)


def _run_all(running: Running) -> list[SweepRecord]:
    sweep, workers = running.sweep, running.workers
    with ThreadPoolExecutor(running.jobs) as pool:
        try:
            waiting = [pool.submit(running.line, task, method) for task in sweep.tasks for method in sweep.methods]
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            workers.stop()
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:  # asked twice
                workers.stop(at_once=True)
            raise
    return [record for line in waiting for record in line.result()]

"""`Run`: the folder of a run, and which process may train into it.

run.yaml      the configuration, defaults included      checkpoints/  whole ones only, for --resume
adapter/      the adapter, with tokenizer and template  result.json   `RunResult`: written last
model/        instead of adapter/, without an adapter    .lock         empty; held while a process trains here
report.html   the page
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import hold_folder, refuse_address, write_atomically
from ..checkpoint.claim import LOCK_FILE
from ..checkpoint.run_folder import ADAPTER, MODEL, RUN_FILE
from ..errors import AdapterError, OptionError, OutputError
from ..export.card import write_run_card
from ..recipes.table import load_config
from ..training.checkpoints import checkpoints, clear_partial, examples_a_step
from ..training.config import RunConfig
from ..training.processes import join
from ..training.yaml_file import write_yaml
from .overwrite import refuse_to_replace
from .result import RESULT_FILE, RunResult

CHECKPOINTS, PAGE = "checkpoints", "report.html"
# Data loading processes check every five seconds whether their run is alive (torch's MP_STATUS_CHECK_INTERVAL), and
# hold its lock until then.
WORKERS_LINGER = 10.0
# May differ when a run continues, since it does not change the weights.
HARMLESS = ("save_every", "keep_checkpoints", "report_to", "validate_every", "workers")
# May differ as long as their product with the number of processes stays: so a run can move to other machines.
STEP_PARTS = ("batch_size", "gradient_accumulation")


@dataclass(frozen=True)
class Run:
    """A run's folder, and the paths of its parts."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Get an existing run; `AdapterError` for any other folder."""
        run = cls(Path(folder))
        if not (run.folder / RUN_FILE).is_file():
            if (run.folder / "concept.json").is_file():
                raise AdapterError(
                    f"{folder}: this concept was trained before 0.1.0. Draw with it by spectune.concepts.pipeline."
                    f"load_concepts, or train it again."
                )
            raise AdapterError(f"{folder}: this is not the folder of a run: it has no {RUN_FILE}. Check the path.")
        return run

    def config(self, overrides: Iterable[str] = ()) -> RunConfig:
        """Get the run's configuration; `overrides` may change only what is evaluated (`evaluation.x=…`)."""
        for override in overrides:
            if not override.startswith("evaluation."):
                raise OptionError(f"{override!r}: a finished run allows only evaluation.key=value. Leave it out.")
        return load_config(self.folder / RUN_FILE, overrides)

    @property
    def is_finished(self) -> bool:
        """Whether its result is written, with all its metrics."""
        return (self.folder / RESULT_FILE).is_file() and not self.result.unmeasured

    @property
    def result(self) -> RunResult:
        """Get its result; `DataError` for a run that is not finished."""
        return RunResult.read(self.folder)

    def write(self, result: RunResult) -> None:
        """Write the whole result or nothing, and the card of what was trained."""
        result.write(self.folder / RESULT_FILE)
        for name in (ADAPTER, MODEL):
            if (self.folder / name).is_dir():
                write_run_card(self.folder / name, json.loads(result.to_json()))

    @property
    def page(self) -> Path:
        """The path of its page."""
        return self.folder / PAGE

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS

    def tuned(self, config: RunConfig) -> Path:
        """Get the path of the adapter, or of the whole model without one."""
        return self.folder / (MODEL if config.adapter_options is None else ADAPTER)

    def last_checkpoint(self) -> Path | None:
        """Get the newest complete checkpoint."""
        return next(iter(reversed(checkpoints(self.checkpoints))), None)


@contextmanager
def opened_folder(config: RunConfig, run: Run, resume: bool, overwrite: bool = False) -> Iterator[bool]:
    """Be the only process that trains into the folder, which is new, or contains this same run.

    Get whether, with `overwrite`, it holds another run: nothing is done to that yet, `replace_run` is for later.
    """
    folder = run.folder
    refuse_address(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: the output must be a folder, but this is a file. Choose another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot create this folder: {error.strerror}. Choose another one.") from error
    with hold_folder(folder, WORKERS_LINGER if config.training.workers else 0.0):
        begins = not (folder / RUN_FILE).is_file()
        if overwrite and not begins:
            refuse_to_replace(folder)
        else:
            _begin_or_continue(config, run, resume)
        try:
            yield overwrite and not begins
        except Exception:
            if begins:
                _leave_nothing(run)
            raise


def _leave_nothing(run: Run) -> None:
    """Delete what a refused run has written, so that it does not block the folder for the next try.

    The empty .lock stays: another process may be waiting for it.
    """
    with suppress(OSError):
        run.checkpoints.rmdir()  # only if it is empty
    if {path.name for path in run.folder.iterdir()} <= {RUN_FILE, LOCK_FILE}:
        (run.folder / RUN_FILE).unlink(missing_ok=True)


def _begin_or_continue(config: RunConfig, run: Run, resume: bool) -> None:
    """Write run.yaml into a new folder, or check that the folder's run is this one; clear a killed process's files."""
    folder = run.folder
    if (folder / RUN_FILE).is_file():
        if not resume:
            state = "a finished run" if run.is_finished else "an unfinished run"
            raise OutputError(
                f"{folder}: contains {state}. Continue it with --resume, replace it with --overwrite, or choose "
                f"another folder."
            )
        refuse_other_run(config, run)
    elif any(not path.name.startswith((".lock", f".{RUN_FILE}.partial-")) for path in folder.iterdir()):
        raise OutputError(f"{folder}: contains other files. Choose a new or an empty folder.")
    else:
        write_atomically(folder / RUN_FILE, write_yaml(config.plain()))
    for left in [*folder.glob(f".{RUN_FILE}.partial-*"), *folder.glob(f".{RESULT_FILE}.partial-*")]:
        left.unlink(missing_ok=True)
    clear_partial(run.checkpoints)


def refuse_other_run(config: RunConfig, run: Run) -> None:
    """Raise `OutputError` unless the folder's run has this configuration, as far as it affects the weights."""
    before, now, folder = run.config().plain(), config.plain(), run.folder
    last = run.last_checkpoint()
    examples = None if last is None else examples_a_step(last)
    for values in (before, now):
        for name in (*HARMLESS, *(() if examples is None else STEP_PARTS)):
            values["training"].pop(name)
    different = sorted(differences(before, now))
    if different:
        raise OutputError(
            f"{folder}: its run has another configuration: {', '.join(different[:3])}. "
            f"Give the same configuration, replace the run with --overwrite, or choose another folder."
        )
    asked, processes = config.training, join().num_processes
    found = asked.batch_size * asked.gradient_accumulation * processes
    if examples is not None and examples != found:
        raise OutputError(
            f"{folder}: its run has {examples} examples per step, but {asked.batch_size} x "
            f"{asked.gradient_accumulation} on each of {processes} processes are {found}. Give a "
            f"training.batch_size and gradient_accumulation that make {examples}, or choose another folder."
        )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Get a line for each key whose value in two configurations differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]

"""`SweepRecord`: one run of a sweep: its place in the sweep, its result, and the sweep's own measurements."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import Field

from ..errors import DataError, OutputError, SpectuneError
from ..recipes.table import parse_config
from ..runs.result import RESULT_FILE, RunResult
from ..training.rates import method_of
from ..training.record import Record
from .config import Cell


class Stopped(Record):
    """Where and why a rate was stopped early while one was chosen."""

    step: int
    steps: int
    """Of the whole run."""
    reason: str
    validation_losses: list[tuple[int, float]]
    """(step, loss), as the run told them."""


class SweepRecord(Record):
    """One run of a sweep, as in its JSON file."""

    task: str
    method: str
    """Its name in the sweep."""
    kind: str
    """One of METHODS, one of PEFT's types, none or head."""
    rate: float
    seed: int
    config: dict[str, Any]
    error: str = ""
    """Why the run failed, or its figures on test; empty where all went well."""
    diverged: bool = False
    """Whether it failed by diverging: then it is not tried again."""
    stopped: Stopped | None = None
    """Set for a run that stopped early (`stop: asha`): it was tried, and is neither a result nor a failure."""
    result: RunResult | None = None
    """None for a run that failed or stopped. Test figures are in it at the rate that was chosen, and nowhere else."""
    general_loss: float | None = None
    general_loss_base: float | None = None
    seconds: float = 0.0
    """Seconds of the whole process, including start and evaluation; of a continued run, only its last part; 0 for one
    that stopped early on a cluster."""
    jobs: int = 1
    """Number of runs at the same time, including itself."""
    created: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the run finished."""
        return self.result is not None

    @property
    def found(self) -> RunResult:
        """The result of a finished run."""
        assert self.result is not None, f"{self.task}, {self.method}: {self.error}"
        return self.result

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The run's metrics; none for one that failed."""
        return {} if self.result is None else self.result.metrics

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last tenth of the steps."""
        losses = [] if self.result is None else self.result.losses
        tail = losses[-max(1, len(losses) // 10) :]
        return sum(tail) / len(tail) if tail else None

    @property
    def forgetting(self) -> float | None:
        """Get the rise of the loss on general text, in nats per token."""
        if self.general_loss is None or self.general_loss_base is None:
            return None
        return self.general_loss - self.general_loss_base


def read_record(path: str | Path) -> SweepRecord:
    """Get a run's record from its file; `OutputError` for any other file."""
    try:
        return SweepRecord.read_file(path, "Delete it to repeat the run.")
    except DataError as error:
        if '"status":' in Path(path).read_text("utf-8", "replace"):
            raise OutputError(
                f"{path}: this record was written before 0.1.0. Delete {Path(path).parent} and repeat the command: "
                f"finished runs are not trained again."
            ) from None
        raise OutputError(str(error)) from None


def finished(
    cell: Cell, run_folder: Path, answer: dict[str, Any], provenance: Mapping[str, Any], jobs: int
) -> SweepRecord:
    """Get the record of a run from what its process answered and wrote."""
    common: dict[str, Any] = {
        "task": cell.task,
        "method": cell.method,
        "kind": method_of(cell.config),
        "rate": cell.rate,
        "seed": cell.seed,
        "config": cell.config.plain(),
        "seconds": float(answer.get("seconds", 0.0)),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "jobs": jobs,
        "provenance": {name: answer.get(name, value) for name, value in provenance.items()},
    }
    if "stopped" in answer:
        return SweepRecord(**common, stopped=answer["stopped"])
    if "error" in answer or not (run_folder / RESULT_FILE).is_file():
        error = str(answer.get("error", "no result was written"))
        return SweepRecord(**common, error=error, diverged=bool(answer.get("diverged")))
    return SweepRecord(
        **common,
        result=RunResult.read(run_folder).model_copy(update={"folder": ""}),
        general_loss=answer.get("general_loss"),
        general_loss_base=answer.get("general_loss_base"),
    )


def as_now(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Get a record's configuration with the defaults of options that an older version did not have."""
    try:
        return parse_config(config).plain()
    except SpectuneError:
        return config


def same_base(record: SweepRecord, cell: Cell) -> bool:
    """Whether a run began with the same model and data."""
    now = cell.config.plain()
    return all(record.config.get(name) == now[name] for name in ("model", "revision", "dtype", "data"))

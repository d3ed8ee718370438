"""`SweepRecord`: what one run of a sweep found out, as its JSON holds it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..errors import OutputError


@dataclass(frozen=True)
class SweepRecord:
    """One run of a sweep as its JSON holds it."""

    task: str
    method: str
    kind: str
    """One of METHODS, one of PEFT's types, or none."""
    rate: float
    seed: int
    status: str
    """success or failed."""
    config: dict[str, Any]
    error: str = ""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    final_loss: float | None = None
    """Mean training loss of the last tenth of the steps."""
    steps: int = 0
    trainable: int = 0
    head: int = 0
    total: int = 0
    step_seconds: float | None = None
    peak_bytes: int | None = None
    file_bytes: int = 0
    general_loss: float | None = None
    general_loss_base: float | None = None
    device: str = ""
    seconds: float = 0.0
    """Of the whole process, start and evaluation included; of the last part where the run was continued."""
    jobs: int = 1
    """How many runs were at work at a time, itself included."""
    created: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the record; NaN and infinity as words, which `float` reads."""
        write_atomically(path, json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n")

    @property
    def ok(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "success"

    @property
    def forgetting(self) -> float | None:
        """Get the rise of the loss on general text, in nats a token."""
        if self.general_loss is None or self.general_loss_base is None:
            return None
        return self.general_loss - self.general_loss_base


def read_record(path: str | Path) -> SweepRecord:
    """Get a run's record from its file; `OutputError` for what is none."""
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        values["metrics"] = {s: {n: float(v) for n, v in f.items()} for s, f in values["metrics"].items()}
        for name in ("final_loss", "general_loss", "general_loss_base"):
            values[name] = None if values[name] is None else float(values[name])
        return SweepRecord(**values)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise OutputError(
            f"{path}: this is no record of a run ({error}). Delete it, and the run is done again."
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

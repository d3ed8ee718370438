"""`RunResult`: what a finished run found out, as `result.json` holds it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class RunResult:
    """What a finished run found out; `result.json` holds it."""

    config: dict[str, Any]
    """The configuration, defaults included."""
    metrics: dict[str, dict[str, float]]
    """Split (validation, test; lm_eval for its tasks) -> metric -> figure. Empty without held-out examples."""
    losses: list[float]
    """One for each optimizer step."""
    learning_rate: float
    trainable: int
    """Numbers of the adapter (or of the whole model), without the head."""
    head: int
    """Numbers of a new head and other modules_to_save, trained in full by every method."""
    total: int
    """Numbers of the model without the adapter."""
    step_seconds: float | None
    """Median time of an optimizer step; None where no step was left to do."""
    peak_bytes: int | None
    """Most memory that was in use: of the accelerator, else of the whole process since it started."""
    device: str
    file_bytes: int
    """Size of the saved tensors, head included."""
    folder: str = ""
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) of each look at the validation examples during training (`training.validate_every`)."""

    @property
    def steps(self) -> int:
        """Optimizer steps that were done."""
        return len(self.losses)

    def to_json(self) -> str:
        """Get the text of `result.json`; NaN and infinity as words, which `float` reads."""
        values = asdict(self) | {"losses": [v if math.isfinite(v) else str(v) for v in self.losses]}
        values["validation_losses"] = [[s, v if math.isfinite(v) else str(v)] for s, v in self.validation_losses]
        values["metrics"] = {
            split: {name: v if math.isfinite(v) else str(v) for name, v in figures.items()}
            for split, figures in self.metrics.items()
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """Get the result of a finished run from its folder; `DataError` for one that is not finished or not whole."""
        path = Path(folder, RESULT_FILE)
        if not path.is_file():
            raise DataError(f"{folder}: asked for a finished run, found no {RESULT_FILE}. Continue it with --resume.")
        try:
            values = json.loads(path.read_text("utf-8"))
            values["losses"] = [float(value) for value in values["losses"]]
            values["validation_losses"] = [(int(s), float(v)) for s, v in values.get("validation_losses", [])]
            values["metrics"] = {s: {n: float(v) for n, v in f.items()} for s, f in values["metrics"].items()}
            return cls(**(values | {"folder": str(Path(folder).resolve())}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: this is no result of a run ({error}). Delete it and continue with --resume."
            ) from None

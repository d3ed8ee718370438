"""`RunResult`: everything that a finished run found out, as `result.json` holds it and its page shows it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import DataError
from ..training.record import Plain, Record, Text

RESULT_FILE = "result.json"
# Metrics that are shares from 0 to 1, drawn as bars; losses and correlations stand in a table.
SHARES = ("accuracy", "f1", "macro_f1", "exact_match", "gsm8k")


class Metric(Record):
    """One measured figure that the run is compared with, and what it was measured on."""

    name: Text
    value: float
    note: Text = ""
    share: bool = True
    """The value is a share from 0 to 1, as an accuracy is, and is drawn as a bar; others stand in a table."""

    @model_validator(mode="after")
    def _between(self) -> Metric:
        if self.share and not 0 <= self.value <= 1:
            raise ValueError(f"metric {self.name!r} is {self.value}, a share lies between 0 and 1; use share=False")
        return self


class Size(Record):
    """What one way of tuning costs: the numbers it trains, and the bytes of its file if there is one."""

    name: Text
    trainable: int
    file_bytes: int | None = None


class LayerSpectrum(Record):
    """The singular values of one layer's weight, descending, before and after tuning."""

    name: Text
    before: list[float]
    after: list[float]


class LayerMove(Record):
    """How far one layer has moved."""

    name: Text
    moved: float
    """|dW|_F."""
    norm: float
    """|W|_F."""

    @property
    def share(self) -> float:
        """|dW|_F as a share of |W|_F; 0 for a weight of zeros."""
        return self.moved / self.norm if self.norm else 0.0


class Check(Record):
    """One thing that was checked, and what came out."""

    name: Text
    ok: bool
    text: Text = ""


class Example(Record):
    """One held-out input, the right answer, and the tuned model's answer."""

    text: Text
    expected: Text
    predicted: Text

    @property
    def right(self) -> bool:
        """Whether the model gave the expected answer."""
        return self.expected == self.predicted


class Drawing(Record):
    """One picture that the run drew."""

    caption: Text
    png: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]
    """The PNG file in base64, as the page embeds it."""

    @classmethod
    def of(cls, caption: str, png: bytes) -> Drawing:
        """Get the record of a PNG file."""
        return cls(caption=caption, png=base64.b64encode(png).decode("ascii"))


class RunResult(Record):
    """What a finished run found out. Files of a later format are refused, not half-read."""

    format: Literal[2] = 2
    title: Text = ""
    task: Text = ""
    """What was learned, in a few words."""
    method: Text = ""
    """One of METHODS, one of PEFT's types, head, or none (every weight)."""
    config: Plain
    """The configuration, defaults included."""
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Split (validation, test; lm_eval for its tasks) -> metric -> figure. Empty without held-out examples."""
    unmeasured: dict[str, str] = Field(default_factory=dict)
    """Split -> why its metrics could not be computed after training. Such a run is not finished: --resume measures."""
    compared: list[Metric] = Field(default_factory=list)
    """What the run is compared with: baselines, on the same examples."""
    losses: list[float]
    """One for each optimizer step; NaN and infinity are kept, a run that diverged is shown as one."""
    validation_losses: list[tuple[int, float]] = Field(default_factory=list)
    """(step, loss) of each look at the validation examples during training (`training.validate_every`)."""
    learning_rate: float
    trainable: int
    """Numbers of the adapter (or of the whole model), without the head."""
    head: int = 0
    """Numbers of a new head and other modules_to_save, trained in full by every method."""
    total: int = 0
    """Numbers of the model without the adapter."""
    step_seconds: float | None = None
    """Median time of an optimizer step; None where no step was left to do."""
    peak_bytes: int | None = None
    """Most memory that was in use: of the accelerator, else of the whole process since it started."""
    device: str = ""
    file_bytes: int | None = None
    """Size of the saved tensors, head included."""
    sizes: list[Size] = Field(default_factory=list)
    """What was trained and written, part by part; the first is this run's adapter."""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    looked_at: bool = False
    """Whether the model was looked at after training: spectra, updates and examples are of it."""
    spectra: list[LayerSpectrum] = Field(default_factory=list)
    updates: list[LayerMove] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    drawings: list[Drawing] = Field(default_factory=list)
    """What the model drew, in the order in which it was drawn."""
    folder: Annotated[str, Field(exclude=True)] = ""
    """Where the run is on this machine; not part of the file."""

    @property
    def steps(self) -> int:
        """Optimizer steps that were done."""
        return len(self.losses)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """Get the result of a finished run from its folder; `DataError` for one that is not finished or not whole."""
        path = Path(folder, RESULT_FILE)
        if not path.is_file():
            raise DataError(f"{folder}: the run is not finished: there is no {RESULT_FILE}. Continue it with --resume.")
        found = cls.read_file(path, "Delete it and continue with --resume.")
        return found.model_copy(update={"folder": str(Path(folder).resolve())})

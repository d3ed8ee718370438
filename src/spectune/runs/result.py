"""`RunResult`: everything that a finished run measured, for `result.json` and its page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import DataError
from ..training.record import Plain, Record, Text

RESULT_FILE = "result.json"
# Metrics that are shares from 0 to 1 are drawn as bars; losses and correlations are in a table.
SHARES = ("accuracy", "f1", "macro_f1", "exact_match", "gsm8k", "reward_accuracy")


class Metric(Record):
    """One figure to compare the run with, and what it was measured on."""

    name: Text
    value: float
    note: Text = ""
    share: bool = True
    """True if the value is a share from 0 to 1, such as an accuracy, drawn as a bar; others are in a table."""

    @model_validator(mode="after")
    def _between(self) -> Metric:
        if self.share and not 0 <= self.value <= 1:
            raise ValueError(f"metric {self.name!r} is {self.value}, but a share is between 0 and 1; use share=False")
        return self


class Size(Record):
    """The cost of one way of tuning: its trained numbers, and the bytes of its file if there is one."""

    name: Text
    trainable: int
    file_bytes: int | None = None


class LayerSpectrum(Record):
    """The singular values of one layer's weight, descending, before and after tuning."""

    name: Text
    before: list[float]
    after: list[float]


class LayerMove(Record):
    """How far one layer moved."""

    name: Text
    moved: float
    """|dW|_F."""
    norm: float
    """|W|_F."""

    @property
    def share(self) -> float:
        """|dW|_F / |W|_F; 0 for a weight of zeros."""
        return self.moved / self.norm if self.norm else 0.0


class Check(Record):
    """One check and its outcome."""

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
        """Whether the model's answer is right."""
        return self.expected == self.predicted


class Confusion(Record):
    """How many held-out examples of each class the model took for which class."""

    split: Text
    labels: list[Text]
    counts: list[list[int]]
    """A row for each right class, in it a number for each answer."""

    @model_validator(mode="after")
    def _square(self) -> Confusion:
        sizes = {len(self.labels), len(self.counts), *map(len, self.counts)}
        if len(sizes) != 1 or not self.labels or min(map(min, self.counts)) < 0:
            raise ValueError("confusion: it needs a row and a column of counts for each label")
        return self

    @property
    def most_frequent(self) -> tuple[str, float]:
        """The most frequent class of the split, and the accuracy of always answering it."""
        sizes = [sum(row) for row in self.counts]
        place = max(range(len(sizes)), key=sizes.__getitem__)
        return self.labels[place], sizes[place] / max(sum(sizes), 1)

    def scores(self) -> list[tuple[str, int, float, float, float]]:
        """Get (class, examples, precision, recall, F1) of each class; 0 where nothing is divided."""
        found = []
        for i, label in enumerate(self.labels):
            right, asked, said = self.counts[i][i], sum(self.counts[i]), sum(row[i] for row in self.counts)
            shares = [right / max(said, 1), right / max(asked, 1), 2 * right / max(asked + said, 1)]
            found.append((label, asked, shares[0], shares[1], shares[2]))
        return found


class Sample(Record):
    """What a language model wrote for one held-out prompt, before and after training."""

    prompt: Text
    expected: Text = ""
    before: Text = ""
    """The answer of the base; empty where every weight was trained."""
    after: Text


class Completion(Record):
    """One text that the model wrote while it learned from rewards."""

    step: int
    prompt: Text
    text: Text
    reward: float


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
    """The result of a finished run. Files of a later format are refused."""

    format: Literal[2] = 2
    title: Text = ""
    task: Text = ""
    """The task, in a few words."""
    method: Text = ""
    """One of METHODS, one of PEFT's types, head, or none (every weight)."""
    config: Plain
    """The configuration, including defaults."""
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Split (validation, test; lm_eval for its tasks) -> metric -> figure. Empty without held-out examples."""
    unmeasured: dict[str, str] = Field(default_factory=dict)
    """Split -> why its metrics failed after training. Such a run is not finished: --resume computes them."""
    diverged: Text = ""
    """Empty unless the run diverged: at which step, what is left, what to try. The metrics then are those of the last
    good checkpoint; there are none without one."""
    compared: list[Metric] = Field(default_factory=list)
    """Baselines to compare the run with, on the same examples."""
    losses: list[float]
    """One for each optimizer step; NaN and infinity are kept, so that a diverged run shows."""
    validation_losses: list[tuple[int, float]] = Field(default_factory=list)
    """(step, loss) on the validation examples during training (`training.validate_every`)."""
    curves: dict[str, list[float]] = Field(default_factory=dict)
    """Name -> a figure of every step besides the loss, such as the rewards of chosen and rejected answers."""
    learning_rate: float
    trainable: int
    """Numbers of the adapter (or of the whole model), without the head."""
    directions: Text = ""
    """Directions of data and where they come from: a pass, a cache, a file. Empty for those of the weight."""
    parts: dict[str, int] = Field(default_factory=dict)
    """Part -> numbers of it, where the adapter has several parts."""
    head: int = 0
    """Numbers of a new head and other modules_to_save, trained in full by every method."""
    total: int = 0
    """Numbers of the model without the adapter."""
    step_seconds: float | None = None
    """Median time of an optimizer step; None if no step was left to do."""
    peak_bytes: int | None = None
    """Peak memory of the accelerator, else of the whole process since it started."""
    device: str = ""
    file_bytes: int | None = None
    """Size of the saved tensors, including the head."""
    sizes: list[Size] = Field(default_factory=list)
    """Sizes by part; the first is this run's adapter."""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    looked_at: bool = False
    """Whether the model was analysed after training: spectra, updates and examples are filled."""
    spectra: list[LayerSpectrum] = Field(default_factory=list)
    updates: list[LayerMove] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    confusion: Confusion | None = None
    """Right and answered classes of the test examples, else of the validation examples; None without classes."""
    samples: list[Sample] = Field(default_factory=list)
    completions: list[Completion] = Field(default_factory=list)
    """Texts of the first and of the last step of a run that learned from rewards."""
    drawings: list[Drawing] = Field(default_factory=list)
    """The model's pictures, in their order."""
    folder: Annotated[str, Field(exclude=True)] = ""
    """The run's folder on this machine; not part of the file."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """Get the result of a finished run from its folder; `DataError` if it is missing or damaged."""
        path = Path(folder, RESULT_FILE)
        if not path.is_file():
            raise DataError(f"{folder}: the run is not finished: it has no {RESULT_FILE}. Continue it with --resume.")
        found = cls.read_file(path, "Delete it and continue with --resume.")
        return found.model_copy(update={"folder": str(Path(folder).resolve())})

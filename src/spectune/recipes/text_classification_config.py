"""The configuration of a text_classification run, and GLUE's tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..training.config import DataSection, Section
from .quantization import QuantizedRunConfig


@dataclass(frozen=True)
class GlueTask:
    """The columns and metrics of a GLUE task."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: bool = False
    validation: str = "validation"


PAIR = ("sentence1", "sentence2")
# Columns of the hub's nyu-mll/glue; metrics of Wang et al. (GLUE, arXiv 1804.07461), table 1.
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("matthews", "accuracy")),
    "sst2": GlueTask(("sentence",), ("accuracy",)),
    "mrpc": GlueTask(PAIR, ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "stsb": GlueTask(PAIR, ("pearson", "spearman"), scores=True),
    "mnli": GlueTask(("premise", "hypothesis"), ("accuracy",), validation="validation_matched"),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",)),
    "rte": GlueTask(PAIR, ("accuracy",)),
    "wnli": GlueTask(PAIR, ("accuracy",)),
}
# The columns of other data.
TEXT, PAIR_TEXT, LABEL, RAW_SCORE = "text", "text_pair", "label", "score"


class TextData(DataSection):
    """Texts with labels."""

    glue: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] | None = Field(
        None, description="A GLUE task: columns and metrics, and the data from the hub unless files are given."
    )
    text: str | None = Field(None, description="Column of the text; default: text, or the GLUE task's.")
    text_pair: str | None = Field(None, description="Column of the second text, for tasks on pairs.")
    label: str = Field(LABEL, description="Column of the label or score.")
    labels: list[str] | None = Field(
        None, min_length=2, description="The classes in order; default: those of train, sorted."
    )
    max_tokens: int = Field(128, gt=0, description="Longer texts are cut.")

    @model_validator(mode="after")
    def _where_from(self) -> TextData:
        if self.glue is not None and self.train is None and self.hub is None:
            task = GLUE[self.glue]
            defaults = {"hub": "nyu-mll/glue", "hub_config": self.glue, "train": "train", "validation": task.validation}
            if self.validation_share is not None:
                defaults.pop("validation")
            for name, value in defaults.items():
                object.__setattr__(self, name, getattr(self, name) or value)
        return self

    @property
    def columns(self) -> list[str]:
        """The columns of the text and, for pairs, of the second one."""
        default = GLUE[self.glue].columns if self.glue else (TEXT,)
        first, *rest = default
        second = self.text_pair or (rest[0] if rest else None)
        return [self.text or first, *([second] if second else [])]


class TextEvaluation(Section):
    """How the answers are scored."""

    metrics: list[Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]] = Field(
        default_factory=list,
        description="Default: the GLUE task's; else accuracy for classes, both correlations for scores.",
    )


class TextClassificationConfig(QuantizedRunConfig):
    """A run of the recipe text_classification."""

    new_heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    """The names of the head in transformers' sequence and token classifiers."""

    data: TextData
    evaluation: TextEvaluation = TextEvaluation()
    problem: Literal["classification", "regression"] | None = Field(
        None, description="Classes or scores; default: the GLUE task's, else classification."
    )
    pooling: Literal["model", "mean"] = Field(
        "model", description="The architecture's own head, or a linear head on the mean token (sentence encoders)."
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="Replaces every dropout in the model's config.")

    @property
    def scores(self) -> bool:
        """Whether scores are predicted instead of classes."""
        asked = self.problem or ("regression" if self.data.glue and GLUE[self.data.glue].scores else "classification")
        return asked == "regression"

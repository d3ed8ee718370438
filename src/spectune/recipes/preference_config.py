"""The configuration of a preference run."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from .causal_lm_config import PromptData, WritingEvaluation
from .quantization import QuantizedRunConfig
from .trl_trainers import dropout_of

# trl's names: those of DPOConfig(loss_type=), of KTOConfig(loss_type=), and ORPO.
PairLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip
LabelLoss = Literal["kto", "apo_zero_unpaired"]
LABELLED = get_args(LabelLoss)
# trl's losses that read label_smoothing, and whether they need one.
SMOOTHED = {"robust": False, "exo_pair": True, "aot": False, "aot_unpaired": False}


class PreferenceData(PromptData):
    """Prompts, each with a chosen and a rejected answer, or with one answer and a label."""

    format: Literal["prompt_completion", "messages"] = Field(
        "prompt_completion",
        description="prompt_completion: columns of text; messages: lists of messages, with or beside the prompt.",
    )
    chosen: str | None = Field(None, description="Template of the better answer: '{good}'; default: column chosen.")
    rejected: str | None = Field(None, description="Template of the worse answer; default: column rejected.")
    completion: str | None = Field(
        None, description="Template of the answer for kto and apo_zero_unpaired; default: column completion."
    )

    @model_validator(mode="after")
    def _templates_are_of_texts(self) -> PreferenceData:
        given = [name for name in ("chosen", "rejected", "completion") if getattr(self, name) is not None]
        if given and self.format != "prompt_completion":
            raise ValueError(f"{given[0]} is a template for format prompt_completion, not for {self.format}")
        return self


class PreferenceConfig(QuantizedRunConfig):
    """A run of the recipe preference."""

    data: PreferenceData
    loss: PairLoss | LabelLoss | Literal["orpo"] = Field(
        "sigmoid", description="trl's name; sigmoid is DPO. kto and apo_zero_unpaired read labels, the others pairs."
    )
    beta: float = Field(
        0.1, gt=0, description="How strongly the model is held to the reference; orpo: the odds' share."
    )
    label_smoothing: float | None = Field(
        None, gt=0, lt=0.5, description="Share of wrong preferences (robust, aot, aot_unpaired), or exo_pair's epsilon."
    )
    desirable_weight: float = Field(1.0, gt=0, description="Weight of answers with label true (kto).")
    undesirable_weight: float = Field(1.0, gt=0, description="Weight of answers with label false (kto).")
    evaluation: WritingEvaluation = Field(default_factory=lambda: WritingEvaluation.model_validate({}))

    @property
    def labelled(self) -> bool:
        """Whether a row is one answer with a label."""
        return self.loss in LABELLED

    @model_validator(mode="after")
    def _options_fit(self) -> PreferenceConfig:
        if self.label_smoothing is None and SMOOTHED.get(self.loss):
            raise ValueError(f"loss: {self.loss} needs label_smoothing; its paper recommends 0.001")
        if self.label_smoothing is not None and self.loss not in SMOOTHED:
            raise ValueError(f"label_smoothing has no effect with loss: {self.loss}; use {', '.join(SMOOTHED)}")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1 and not self.labelled:
                raise ValueError(f"{name} has no effect with loss: {self.loss}; use {' or '.join(LABELLED)}")
        for name in ("chosen", "rejected") if self.labelled else ("completion",):
            if getattr(self.data, name) is not None:
                raise ValueError(f"data.{name} is not read with loss: {self.loss}; leave it out")
        if self.loss == "kto" and self.training.batch_size < 2:
            raise ValueError("loss: kto compares the answers of a batch; give training.batch_size of at least 2")
        if (dropout := dropout_of(self)) is not None:
            raise ValueError(f"adapter: {dropout} would change the comparison with the reference; leave it out")
        return self

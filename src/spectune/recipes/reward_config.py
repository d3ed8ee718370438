"""The configuration of a reward run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import nearest
from ..training.config import NO_ADAPTER, Section
from .causal_lm_config import HarnessTasks, PromptData
from .own_reward import OwnReward
from .quantization import QuantizedRunConfig
from .rewards import NAMED, EndsWith, ExactMatch, Gsm8k, JsonSchema, Length, Regex, described, name_of
from .trl_trainers import dropout_of

AnyReward = Annotated[
    Gsm8k | ExactMatch | Regex | JsonSchema | Length | EndsWith | OwnReward, Field(discriminator="reward")
]


class RewardData(PromptData):
    """Prompts, perhaps with a reference answer."""

    format: Literal["prompt_completion", "messages"] = Field(
        "prompt_completion",
        description="prompt_completion: columns of text; messages: a conversation, with or without its last answer.",
    )
    answer: str | None = Field(
        None, description="Template of the reference for gsm8k and exact_match; messages: the last answer."
    )


class Generation(Section):
    """How answers are drawn."""

    max_new_tokens: int = Field(256, gt=0, description="Limit for one answer.")
    temperature: float = Field(1.0, gt=0, description="Higher is more varied.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens with this share; 1 for all.")
    top_k: int = Field(0, ge=0, description="Draw from this many tokens; 0 for all.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1, tokens that were said are less likely.")


class RewardEvaluation(Section):
    """How held-out prompts are answered."""

    samples: int = Field(1, ge=0, description="Answers drawn for each prompt, as in training; 0: the likeliest tokens.")
    batch_size: int = Field(8, gt=0, description="Answers that are computed together.")
    lm_eval: HarnessTasks | None = Field(None, description="Tasks of lm-eval, after training and in `evaluate`.")


class RewardConfig(QuantizedRunConfig):
    """A run of the recipe reward."""

    data: RewardData
    rewards: list[AnyReward] = Field(
        default_factory=list, description=f"Each {{reward: NAME, weight: 1.0, option: …}}: {described()}."
    )
    group_size: int = Field(8, ge=2, description="Answers to one prompt that are compared with each other.")
    beta: float = Field(0.0, ge=0, description="Weight of the distance (KL) from the base; 0 for none.")
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field("dapo", description="trl's name of the loss.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Whose standard deviation divides the rewards."
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="Limit of a step's change in a token's probability.")
    generation: Generation = Field(default_factory=lambda: Generation.model_validate({}))
    evaluation: RewardEvaluation = Field(default_factory=lambda: RewardEvaluation.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _names_exist(cls, values: Any) -> Any:
        asked = values.get("rewards") if isinstance(values, dict) else None
        for entry in asked if isinstance(asked, list) else []:
            name = entry.get("reward") if isinstance(entry, dict) else entry
            if isinstance(name, str) and ".py" in name:
                raise ValueError(
                    f"rewards: {name} is Python code, and no YAML file may start code. Give it on the command line: "
                    f"--reward FILE.py:function"
                )
            known = [name_of(kind) for kind in NAMED]
            if not isinstance(entry, dict) or name not in (*known, "python"):
                raise ValueError(f"rewards: {name!r} is not a reward like {{reward: regex, …}}. {nearest(name, known)}")
        return values

    @model_validator(mode="after")
    def _options_fit(self) -> RewardConfig:
        answers = self.training.batch_size * self.training.gradient_accumulation
        if answers % self.group_size:
            raise ValueError(
                f"group_size: {self.group_size} must divide the {answers} answers of a step (training.batch_size x "
                f"gradient_accumulation)"
            )
        if self.training.validate_every is not None:
            raise ValueError("training.validate_every: the loss of rewards says nothing; leave it out")
        if self.beta and self.adapter == NO_ADAPTER:
            raise ValueError("beta needs an adapter, whose base is the reference; leave it out with adapter: none")
        if self.data.answer is not None and self.data.format == "messages":
            raise ValueError("data.answer is a template for format prompt_completion, not for messages")
        if (dropout := dropout_of(self)) is not None:
            raise ValueError(f"adapter: {dropout} would change the model between drawing and learning; leave it out")
        return self

"""The configuration of a causal_lm run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..training.config import DataSection, PathOrName, Section
from .conversations import Format
from .quantization import QuantizedRunConfig


class PromptData(DataSection):
    """Prompts in a template over columns, or through the chat template."""

    format: Format = Field(
        "prompt_completion",
        description="Format of a row; messages: OpenAI's (role, content) or ShareGPT's (from, value).",
    )
    prompt: str | None = Field(None, description="Template over the columns: 'Question: {question}\\nAnswer:'.")
    chat: bool = Field(False, description="Render prompt and answer with the chat template, as user and assistant.")
    chat_template: PathOrName | None = Field(
        None, description="A .jinja file, or 'plain'; default: the tokenizer's own. Saved with the adapter."
    )
    max_tokens: int = Field(1024, gt=1, description="Longer examples are cut at the end.")

    @model_validator(mode="after")
    def _template_fits(self) -> PromptData:
        if self.prompt is not None and self.format not in ("prompt_completion", "text"):
            raise ValueError(f"prompt is a template for formats prompt_completion and text, not for {self.format}")
        if self.chat_template is not None and not self.talks:
            raise ValueError("chat_template works only with format messages or chat: true; leave it out")
        return self

    @property
    def talks(self) -> bool:
        """Whether the chat template renders the rows."""
        return self.chat or self.format == "messages"


class ConversationData(PromptData):
    """Instructions, conversations or texts."""

    completion: str | None = Field(None, description="Template of the answer: ' {answer}'.")
    loss_on: Literal["response", "assistant", "all"] = Field(
        "response", description="Tokens with loss: the last answer, every answer of the assistant, or all."
    )
    packing: bool = Field(False, description="Put several examples into one row of max_tokens.")

    @model_validator(mode="after")
    def _templates_fit(self) -> ConversationData:
        if self.completion is not None and self.format != "prompt_completion":
            raise ValueError(f"completion is a template for format prompt_completion, not for {self.format}")
        if self.chat and self.format == "text":
            raise ValueError("chat needs a prompt and a completion; format text has neither")
        if self.loss_on == "assistant" and not self.talks:
            raise ValueError("loss_on: assistant needs messages; use format messages or chat: true")
        return self


class HarnessTasks(Section):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    tasks: list[str] = Field(min_length=1, description="Any task that lm-eval knows, such as gsm8k or mmlu.")
    few_shot: int | None = Field(None, ge=0, description="Examples in the prompt; default: the task's own.")
    limit: int | None = Field(None, gt=0, description="Only this many questions of a task, for a quick look.")


class WritingEvaluation(Section):
    """How a model writes its answers, and what else it is tried on."""

    max_new_tokens: int = Field(256, gt=0, description="Limit for one answer.")
    batch_size: int = Field(8, gt=0, description="Examples or answers that are computed together.")
    lm_eval: HarnessTasks | None = Field(None, description="Tasks of lm-eval, after training and in `evaluate`.")


class LMEvaluation(WritingEvaluation):
    """How held-out answers are scored."""

    metrics: list[Literal["loss", "exact_match", "gsm8k"]] = Field(
        ["loss"], description="loss: of the response tokens; the others generate text."
    )


class CausalLMConfig(QuantizedRunConfig):
    """A run of the recipe causal_lm."""

    data: ConversationData
    evaluation: LMEvaluation = Field(default_factory=lambda: LMEvaluation.model_validate({}))

"""Language models on instruction and chat data: loss on the response, the chat template saved beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from ..errors import DataError, MissingExtraError, OptionError
from ..training.config import DataSection, PathOrName, RunConfig, Section
from ..training.loop import Plan, checked_arguments, loop_arguments, looped
from .answers import GENERATED, continuations, gsm8k_answer, harness_ready, harness_scores, prompt_ids
from .conversations import PLAIN_TEMPLATE, Format, answer_of, prepared, prompt_of
from .data import Row, limited, load_splits, place
from .recipe import Answered, Recipe, Shown, pretrained, some, tokenizer_of

IGNORED = -100  # torch's cross entropy leaves this label out


class ConversationData(DataSection):
    """Instructions, conversations or texts."""

    format: Format = Field("prompt_completion", description="How a row is read.")
    prompt: str | None = Field(None, description="Template over the columns: 'Question: {question}\\nAnswer:'.")
    completion: str | None = Field(None, description="Template of what is to be written: ' {answer}'.")
    chat: bool = Field(False, description="Render prompt and completion with the chat template, as user and assistant.")
    chat_template: PathOrName | None = Field(
        None, description="A .jinja file, or 'plain'; default: the tokenizer's own. Saved beside the adapter."
    )
    loss_on: Literal["response", "assistant", "all"] = Field(
        "response", description="Which tokens carry loss: the last answer, every answer of the assistant, or all."
    )
    max_tokens: int = Field(1024, gt=1, description="Longer examples are cut at the end.")
    packing: bool = Field(False, description="Put several examples into one row of max_tokens.")

    @model_validator(mode="after")
    def _templates_fit(self) -> ConversationData:
        if self.completion is not None and self.format != "prompt_completion":
            raise ValueError(f"completion is a template for format prompt_completion, not for {self.format}")
        if self.prompt is not None and self.format not in ("prompt_completion", "text"):
            raise ValueError(f"prompt is a template for formats prompt_completion and text, not for {self.format}")
        if self.chat and self.format == "text":
            raise ValueError("chat needs a prompt and a completion; format text has neither")
        if self.loss_on == "assistant" and not self.talks:
            raise ValueError("loss_on: assistant needs messages; use format messages or chat: true")
        if self.chat_template is not None and not self.talks:
            raise ValueError("chat_template is used by format messages or chat: true; leave it out")
        return self

    @property
    def talks(self) -> bool:
        """Whether the chat template renders the rows."""
        return self.chat or self.format == "messages"


class HarnessTasks(Section):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    tasks: list[str] = Field(min_length=1, description="Any task that lm-eval knows, such as gsm8k or mmlu.")
    few_shot: int | None = Field(None, ge=0, description="Examples in the prompt; default: the task's own.")
    limit: int | None = Field(None, gt=0, description="Only so many questions of a task (for a quick look).")


class LMEvaluation(Section):
    """How held-out answers are scored."""

    metrics: list[Literal["loss", "exact_match", "gsm8k"]] = Field(
        ["loss"], description="loss is of the response tokens; the others generate text."
    )
    max_new_tokens: int = Field(256, gt=0, description="How much is written for one answer.")
    batch_size: int = Field(8, gt=0, description="Answers that are written together.")
    lm_eval: HarnessTasks | None = Field(None, description="Tasks of lm-eval, after training and in `evaluate`.")


class CausalLMConfig(RunConfig):
    """A run of the recipe causal_lm."""

    data: ConversationData
    evaluation: LMEvaluation = Field(default_factory=lambda: LMEvaluation.model_validate({}))


class CausalLM(Recipe):
    """Prompts and answers in, an adapted language model out."""

    Config = CausalLMConfig
    task_type = "CAUSAL_LM"
    title = "Language model"
    example = {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "dtype": "bfloat16",
        "adapter": {
            "method": "spectral_a",
            "r": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        },
        "data": {
            "hub": "openai/gsm8k",
            "hub_config": "main",
            "train": "train",
            "test": "test",
            "prompt": "Question: {question}\nAnswer: ",
            "completion": "{answer}",
            "max_tokens": 512,
        },
        "evaluation": {"metrics": ["loss", "gsm8k"], "max_new_tokens": 256},
        "training": {"epochs": 2, "batch_size": 8, "precision": "bfloat16"},
    }
    config: CausalLMConfig

    @cached_property
    def processing(self) -> Any:
        tokenizer = tokenizer_of(self.config)
        asked = self.config.data.chat_template
        if asked is not None:
            tokenizer.chat_template = PLAIN_TEMPLATE if asked == "plain" else _read_template(asked)
        if self.config.data.talks and tokenizer.chat_template is None:
            raise OptionError(
                f"data: the rows are conversations, and the tokenizer of {self.config.model} has no chat template. "
                f"Give data.chat_template: a .jinja file, or plain."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        data = self.config.data
        rows = limited(load_splits(data, self.config.seed), data, self.config.seed)
        return {s: prepared(part, data.format, data.prompt, data.completion, data.chat, s) for s, part in rows.items()}

    def build_model(self, weights: Path | None = None) -> nn.Module:
        return pretrained(AutoModelForCausalLM, self.config, weights)

    def prepare(self) -> None:
        super().prepare()
        asked = self.config.evaluation.lm_eval
        if asked is not None:
            harness_ready(asked.tasks)

    def ready(self, split: str) -> None:
        self.rows(split)
        if split == "train":
            return
        for name in (name for name in self.config.evaluation.metrics if name in GENERATED):
            for i, row in enumerate(self.splits[split]):
                prompt_of(row)
                if name == "gsm8k" and gsm8k_answer(answer_of(row)) is None:
                    raise DataError(
                        f"{place(row, split, i)}: gsm8k looks for '#### ' and a number in the answer, and there is "
                        f"none. Use exact_match."
                    )

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Get tokens and labels of each example; one whose response is cut off whole is left out."""
        if split not in self._rows:
            self._rows[split] = self._all_tokenised(split)
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _all_tokenised(self, split: str) -> list[dict[str, Any]]:
        found = [self.tokenised(row) for row in self.splits[split]]
        kept = [row for row in found if any(label != IGNORED for label in row["labels"])]
        if not kept:
            raise DataError(f"data.{split}: no response fits into max_tokens={self.config.data.max_tokens}. Raise it.")
        return kept

    def tokenised(self, row: Row, whole: bool = False) -> dict[str, Any]:
        """Get an example's tokens, and labels that leave out what carries no loss; `whole` does not cut it."""
        data, tokenizer = self.config.data, self.processing
        if isinstance(row.get("prompt"), list):
            found = tokenizer.apply_chat_template(
                [*row["prompt"], *row["completion"]], return_dict=True, return_assistant_tokens_mask=self._wants_mask()
            )
            ids, mask = list(found["input_ids"]), found.get("assistant_masks")
        else:
            text = row["text"] if "text" in row else row["prompt"] + row["completion"]
            ids, mask = list(tokenizer(text)["input_ids"]), None
            # Some tokenizers end every text so, some none; a model that never saw the end would never stop.
            ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
        if data.loss_on == "all" or "prompt" not in row:
            labels = list(ids)
        elif data.loss_on == "assistant":
            labels = [token if carries else IGNORED for token, carries in zip(ids, mask or [], strict=True)]
        else:
            start = _common(prompt_ids(tokenizer, row["prompt"]), ids)
            labels = [IGNORED] * start + ids[start:]
        end = None if whole else data.max_tokens
        return {"input_ids": ids[:end], "labels": labels[:end]}

    def _wants_mask(self) -> bool:
        if self.config.data.loss_on != "assistant":
            return False
        if "generation" not in (self.processing.chat_template or ""):
            raise OptionError(
                "data.loss_on=assistant: the chat template does not mark the assistant's part with {% generation %}. "
                "Give a data.chat_template that does (plain does), or loss_on: response (the last answer)."
            )
        return True

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        pads = {"input_ids": self.processing.pad_token_id, "labels": IGNORED}
        batch = {
            name: torch.tensor([r[name] + [pad] * (width - len(r[name])) for r in rows]) for name, pad in pads.items()
        }
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return batch | {"attention_mask": (torch.arange(width)[None] < lengths).long()}

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        try:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer
        except ImportError as error:
            raise MissingExtraError(
                f"recipe causal_lm: trl, which trains language models, cannot be imported ({error}). "
                f"pip install 'spectune[llm,train]'"
            ) from None
        data = self.config.data
        validates = self.config.training.validate_every is not None
        arguments = loop_arguments(self.config, folder) | {
            "max_length": data.max_tokens,
            "packing": data.packing,
            "remove_unused_columns": True,
        }
        return looped(SFTTrainer)(
            model=model,
            args=checked_arguments(SFTConfig, arguments | more),
            # Tokens and labels are made here, so that `check` shows, and evaluation scores, what is trained on.
            train_dataset=Dataset.from_list(self.rows("train")),
            eval_dataset=Dataset.from_list(self.rows(self.validation_split())) if validates else None,
            processing_class=self.processing,
            callbacks=list(callbacks),
            plan=plan,
        )

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        asked = self.config.evaluation
        found = self.response_loss(model, split) if "loss" in asked.metrics else {}
        scored = [name for name in asked.metrics if name in GENERATED]
        if scored:
            rows = self.splits[split]
            written = self.generate(model, [prompt_of(row) for row in rows])
            for name in scored:
                right = [GENERATED[name](text, answer_of(row)) for text, row in zip(written, rows, strict=True)]
                found[name] = sum(right) / len(right)
        return found

    def harness(self, model: nn.Module) -> dict[str, float]:
        """Get the figures of the lm-eval tasks that the run asks for, none if it asks for none."""
        asked = self.config.evaluation.lm_eval
        if asked is None:
            return {}
        return harness_scores(
            model,
            self.processing,
            asked.tasks,
            few_shot=asked.few_shot,
            limit=asked.limit,
            batch_size=self.config.evaluation.batch_size,
            chat=self.config.data.talks,
            seed=self.config.seed,
        )

    @torch.no_grad()
    def response_loss(self, model: nn.Module, split: str) -> dict[str, float]:
        """Get the mean negative log likelihood of a token that carries loss, and the perplexity, exp of it."""
        model.eval()
        device, total, count = next(model.parameters()).device, 0.0, 0
        rows = sorted(self.rows(split), key=lambda row: len(row["input_ids"]))
        size = self.config.evaluation.batch_size
        for start in range(0, len(rows), size):
            batch = {name: t.to(device) for name, t in self.collate(rows[start : start + size]).items()}
            labels_BN = batch.pop("labels")[:, 1:]
            logits_BNV = model(**batch).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits_BNV.flatten(0, 1), labels_BN.flatten(), reduction="sum"))
            count += int((labels_BN != IGNORED).sum())
        loss = total / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp of more is no float

    def show(self) -> Shown:
        row = self.tokenised(self.splits["train"][0])
        # The two marks of a space and the mark of a line's end: decoding token by token would drop some of them.
        marks = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
        pieces = [str(p).translate(marks) for p in self.processing.convert_ids_to_tokens(row["input_ids"])]
        return Shown([(piece, label != IGNORED) for piece, label in zip(pieces, row["labels"], strict=True)])

    def remarks(self) -> list[str]:
        """Get what a user should know about the examples: how many are cut or left out."""
        limit, rows = self.config.data.max_tokens, self.splits["train"]
        found = [self.tokenised(row, whole=True) for row in rows]
        long = [row for row in found if len(row["input_ids"]) > limit]
        lost = sum(all(label == IGNORED for label in row["labels"][:limit]) for row in found)
        longest = max(len(row["input_ids"]) for row in found)
        said = [f"the longest example has {longest:,} tokens, max_tokens is {limit:,}"]
        said += [f"{len(long):,} of {len(rows):,} examples are cut at {limit:,} tokens"] if long else []
        said += [f"{lost:,} of them lose their whole response and are left out"] if lost else []
        return said

    def generate(self, model: nn.Module, prompts: Sequence[Any], **options: Any) -> list[str]:
        asked = self.config.evaluation
        given = {"max_new_tokens": asked.max_new_tokens, "batch_size": asked.batch_size} | options
        return continuations(model, self.processing, prompts, **given)

    def as_prompt(self, text: str) -> Any:
        """Get a user's words as this model was taught to read them: through the chat template if it was."""
        return [{"role": "user", "content": text}] if self.config.data.talks else text

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        if not any(name in GENERATED for name in self.config.evaluation.metrics):
            return []
        rows = [self.splits[split][i] for i in some(self.splits[split], count, self.config.seed)]
        written = self.generate(model, [prompt_of(row) for row in rows])
        shown = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in rows]
        return [Answered(t, answer_of(row).strip(), w.strip()) for t, row, w in zip(shown, rows, written, strict=True)]


def _common(first: list[int], second: list[int]) -> int:
    """Get how many tokens two rows begin with together: tokens may merge over the end of the prompt."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise OptionError(
            f"data.chat_template: asked for the file {path}, found nothing. Give a .jinja file, or plain."
        )
    return Path(path).read_text("utf-8")

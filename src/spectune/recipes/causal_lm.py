"""Language models on instruction and chat data: loss on the response; the chat template is saved with the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, TrainerCallback

from ..checkpoint import load_tokenizer
from ..errors import DataError, OptionError
from ..training.arguments import checked_arguments, loop_arguments
from ..training.loop import Plan, looped
from .answers import (
    GENERATED,
    before_and_after,
    continuations,
    end_ids,
    gsm8k_answer,
    harness_ready,
    harness_scores,
)
from .causal_lm_config import CausalLMConfig
from .conversations import answer_of, as_asked, prepared, prompt_of, question_of, template
from .data import Row, limited, load_splits, place
from .pretrained import pretrained
from .recipe import Answered, Recipe, Sampled, Shown, some
from .tokens import IGNORED, Tokens
from .tokens_seen import LOOKED_AT, disagreements, ends_and_beginnings, is_silent, losses
from .trl_trainers import from_trl, trl_trainer


class CausalLM(Recipe):
    """Adapts a language model to prompts and answers."""

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
        tokenizer = load_tokenizer(self.config.model, self.config.revision)
        asked = self.config.data.chat_template
        if asked is not None:
            tokenizer.chat_template = template(tokenizer, asked)
        if self.config.data.talks and tokenizer.chat_template is None:
            raise OptionError(
                f"data: the rows are conversations, but the tokenizer of {self.config.model} has no chat template. "
                f"Give data.chat_template: a .jinja file, or plain."
            )
        if tokenizer.eos_token is None:
            raise OptionError(
                f"model: the tokenizer of {self.config.model} has no end token, so the model cannot learn to stop. "
                f"Give it an eos_token in its tokenizer_config.json."
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
                if isinstance(prompt_of(row), list) and row["completion"][-1].get("tool_calls"):
                    raise DataError(
                        f"{place(row, split, i)}: {name} compares texts, but the answer is a tool call. Leave it out."
                    )
                if name == "gsm8k" and gsm8k_answer(answer_of(row)) is None:
                    raise DataError(
                        f"{place(row, split, i)}: gsm8k needs '#### ' and a number in the answer, but there is "
                        f"none. Use exact_match."
                    )

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Get tokens and labels of each example; examples whose whole response is cut off are left out."""
        if split not in self._rows:
            self._rows[split] = self._all_tokenised(split)
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def asked(self, row: Row) -> list[int]:
        """Get an example's prompt tokens."""
        prompt_of(row)
        # An empty prompt begins as a text does elsewhere, with the token that ends the one before (as in lm-eval).
        return self.tokens.asked(row) or [self.processing.eos_token_id]

    def _all_tokenised(self, split: str) -> list[dict[str, Any]]:
        found = [self.tokenised(row) for row in self.splits[split]]
        kept = [row for row in found if not is_silent(row["labels"])]
        if not kept:
            raise DataError(f"data.{split}: no response fits into max_tokens={self.config.data.max_tokens}. Raise it.")
        return kept

    @cached_property
    def tokens(self) -> Tokens:
        """Examples and prompts as tokens."""
        return Tokens(self.processing, self.config.data.loss_on)

    def tokenised(self, row: Row, whole: bool = False) -> dict[str, Any]:
        """Get an example's tokens and labels, only those with loss; `whole` does not cut it."""
        ids, labels = self.tokens.taught(row)
        end = None if whole else self.config.data.max_tokens
        return {"input_ids": ids[:end], "labels": labels[:end]}

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
        data = self.config.data
        held_out = None if self.config.training.validate_every is None else self.rows(self.validation_split())
        kind, arguments, dataset = from_trl("causal_lm", "SFTTrainer", "SFTConfig")
        own = {"max_length": data.max_tokens, "packing": data.packing, "remove_unused_columns": True}
        return trl_trainer(
            looped(kind),
            checked_arguments(arguments, loop_arguments(self.config, folder) | own | more),
            model=model,
            # Tokens and labels are made here, so that `check` and evaluation use the same ones as training.
            train_dataset=dataset.from_list(self.rows("train")),
            eval_dataset=None if held_out is None else dataset.from_list(held_out),
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
            written = self.generate(model, [self.asked(row) for row in rows])
            for name in scored:
                right = [GENERATED[name](text, answer_of(row)) for text, row in zip(written, rows, strict=True)]
                found[name] = sum(right) / len(right)
        return found

    def harness(self, model: nn.Module) -> dict[str, float]:
        """Get the figures of the run's lm-eval tasks, if it has any."""
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
        """Get the mean negative log likelihood of a token with loss, and its exp, the perplexity."""
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
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp of more overflows

    def show(self) -> Shown:
        row = self.tokenised(self.splits["train"][0])
        return Shown(self.pieces(row["input_ids"], row["labels"]))

    def pieces(self, ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
        """Get each token as text, and whether it has loss."""
        # Two markers of a space and one of a line's end; decoding token by token would drop some of them.
        marks = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
        words = [str(p).translate(marks) for p in self.processing.convert_ids_to_tokens(ids)]
        return [(word, label != IGNORED) for word, label in zip(words, labels, strict=True)]

    def wanted(self, split: str) -> list[Row]:
        """Get the prompts of a split with the answers that the model should give."""
        return self.splits[split]

    def learned(self, split: str) -> list[Row]:
        """Get everything that is learned from a split, as rows of `Tokens.taught`."""
        return self.splits[split]

    def warnings(self) -> list[str]:
        """Get what is cut and lost, and where prompts differ from those in training."""
        limit = self.config.data.max_tokens
        said = []
        for split in self.splits:
            said += losses([self.tokens.taught(row) for row in self.learned(split)], limit, split)
        rows = self.learned("train")[:LOOKED_AT]
        return said + ends_and_beginnings(self.tokens, rows, self._ends()) + disagreements(self.tokens, rows)

    def remarks(self) -> list[str]:
        rows = self.learned("train")
        longest = max(len(self.tokens.taught(row)[0]) for row in rows)
        said = [f"the longest example has {longest:,} tokens, max_tokens is {self.config.data.max_tokens:,}"]
        looked = [row for row in rows[:LOOKED_AT] if "prompt" in row]
        if looked and all(map(self.tokens.agrees, looked)):
            said.append(f"prompts have the same tokens as in training ({len(looked)} examples compared)")
        return said

    def _ends(self) -> list[int]:
        try:
            settings: Any = GenerationConfig.from_pretrained(self.config.model, revision=self.config.revision or "main")
        except OSError:  # without one, generation uses the model's config
            settings = pretrained(AutoConfig, self.config, None)
        return end_ids(self.processing, settings)

    def generate(self, model: nn.Module, prompts: Sequence[Any], **options: Any) -> list[str]:
        asked = self.config.evaluation
        given = {"max_new_tokens": asked.max_new_tokens, "batch_size": asked.batch_size} | options
        return continuations(model, self.processing, prompts, **given)

    def as_prompt(self, text: str) -> Any:
        """Get a user's words in the form of training: through the run's prompt and chat template.

        A prompt of several columns needs a JSON object with a value for each.
        """
        data = self.config.data
        words = as_asked(text, data.format, data.prompt, data.chat)
        return [{"role": "user", "content": words}] if data.talks else words

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        if not any(name in GENERATED for name in self.config.evaluation.metrics):
            return []
        rows = [self.splits[split][i] for i in some(self.splits[split], count, self.config.seed)]
        written = self.generate(model, [self.asked(row) for row in rows])
        return [
            Answered(question_of(row), answer_of(row).strip(), said.strip())
            for row, said in zip(rows, written, strict=True)
        ]

    def samples(self, model: nn.Module, split: str, count: int) -> list[Sampled]:
        rows = [row for row in self.wanted(split) if "prompt" in row]
        rows = [rows[i] for i in some(rows, count, self.config.seed)]
        asked = [self.asked(row) for row in rows]
        before, after = before_and_after(model, lambda: self.generate(model, asked), len(rows))
        right = [answer_of(row).strip() for row in rows]
        return [Sampled(*one) for one in zip(map(question_of, rows), right, before, after, strict=True)]

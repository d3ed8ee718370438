"""A classifier for merged bodies: sentences and labels in, an adapted sentence encoder and its accuracy out.

A sentence encoder was trained to average its tokens, so the head reads that average: a linear head on every token,
its logits averaged over the sentence. transformers has it as a token classifier, which plain PEFT loads as well. A
head on the pooler of the first token would make a weak baseline and flatter every adapter (46% in place of 71%).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from spectune.checkpoint import load_auto, load_tokenizer
from spectune.recipes.text_classification import sentence_logits
from spectune.training.arguments import one_device
from spectune.training.loop import Loss, OnStep, Plan, Watch, looped
from spectune.tuner import attach

WARMUP_STEPS = 10  # Chosen: enough for Adam's second moments to settle.


@dataclass(frozen=True)
class Setting:
    """What a run of this recipe is told."""

    base: Path
    """Folder of the pretrained encoder."""
    labels: tuple[str, ...]
    steps: int
    seed: int
    batch_size: int = 32
    max_tokens: int = 24
    """Longer sentences are cut: a quarter of the demo's are, and their first words tell the language."""
    head_rate: float = 3e-2
    """Learning rate of the new head: the best of 3e-3, 1e-2, 3e-2, 1e-1 for the frozen body, on the validation part."""
    head: str = "classifier"
    """Name of the head, which is trained in full and saved with the adapter."""


@dataclass(frozen=True)
class Outcome:
    """A trained model and the loss of every step."""

    model: nn.Module
    losses: list[float]


class TextClassification:
    """One base, one tokenizer, and what is done with them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tokenizer = load_tokenizer(setting.base)
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def fresh_model(self) -> nn.Module:
        """Get the pretrained encoder with a new head, the same head for the same seed."""
        set_seed(self.setting.seed)
        logging.set_verbosity_error()  # transformers would warn that the head is new, which is the point
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        logging.disable_progress_bar()
        names = dict(enumerate(self.setting.labels))
        model: nn.Module = load_auto(
            AutoModelForTokenClassification,
            self.setting.base,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            # Off for baseline and adapter alike: few steps do not overfit, and noise would hide the comparison.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            classifier_dropout=0.0,
        )
        return model

    def train_head(self, texts: Sequence[str], targets: Sequence[int], on_step: OnStep | None = None) -> Outcome:
        """Get the baseline: the pretrained body frozen, only the head trained."""
        model = self.fresh_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.setting.head in name)
        return self._fit(model, texts, targets, 0.0, on_step)

    def train_adapter(
        self,
        config: Any,
        rate: float,
        texts: Sequence[str],
        targets: Sequence[int],
        on_step: OnStep | None = None,
    ) -> Outcome:
        """Get the base with a trained adapter (any PEFT config) and head; steps, batches, head as the baseline."""
        config = replace(config, task_type="TOKEN_CLS", modules_to_save=[self.setting.head])
        return self._fit(attach(self.fresh_model(), config), texts, targets, rate, on_step)

    def _fit(
        self, model: nn.Module, texts: Sequence[str], targets: Sequence[int], rate: float, on_step: OnStep | None
    ) -> Outcome:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        head = [p for name, p in trained if self.setting.head in name]
        adapter = [p for name, p in trained if self.setting.head not in name]
        rows = [{**row, "labels": target} for row, target in zip(self.tokens(texts), targets, strict=True)]
        losses = fit(
            model,
            rows,
            self.collate,
            sentence_loss,
            steps=self.setting.steps,
            batch_size=self.setting.batch_size,
            rates=[(head, self.setting.head_rate), (adapter, rate)],
            seed=self.setting.seed,
            on_step=on_step,
        )
        return Outcome(model.eval(), losses)

    def tokens(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Get the tokens of every text, without padding."""
        found = self.tokenizer(list(texts), truncation=True, max_length=self.setting.max_tokens)
        return [{name: values[i] for name, values in found.items()} for i in range(len(texts))]

    @torch.no_grad()
    def predict(self, model: nn.Module, texts: Sequence[str]) -> list[int]:
        """Get the most probable label of every text."""
        rows = self.tokens(texts)
        # Texts of one length together: padding is most of the work otherwise.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        found = [0] * len(rows)
        for start in range(0, len(rows), 64):
            places = order[start : start + 64]
            batch = self.collate([rows[i] for i in places])
            for place, label in zip(places, sentence_logits(model, batch).argmax(-1).tolist(), strict=True):
                found[place] = label
        return found


def fit(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    rates: Sequence[tuple[Sequence[nn.Parameter], float]],
    seed: int,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train in place and get the loss of every step.

    AdamW without weight decay, each group of `rates` at its own rate, ten steps of warmup, then linearly to zero.
    The same seed gives the same order of data and, on a CPU, the same weights.
    """
    watch = Watch(on_step)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            optim="adamw_torch",
            warmup_steps=min(WARMUP_STEPS, steps // 2),
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = looped(Trainer)(
            model=model,
            args=one_device(arguments),
            train_dataset=list(rows),
            data_collator=collate,
            callbacks=[watch],
            plan=Plan([(list(parameters), rate) for parameters, rate in rates], loss),
        )
        trainer.train()
    return watch.losses


def sentence_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Get the cross entropy of the sentence logits."""
    return nn.functional.cross_entropy(sentence_logits(model, batch), batch["labels"])


def accuracy(predicted: Sequence[int], targets: Sequence[int]) -> float:
    """Get the share of right answers."""
    return sum(p == t for p, t in zip(predicted, targets, strict=True)) / len(targets)

"""Classification or scoring of texts or pairs: GLUE by name, or your own CSV, JSONL, Parquet or hub data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
)

from ..checkpoint import load_tokenizer
from ..checkpoint.task_file import Task
from ..errors import DataError, OptionError
from ..training.loop import Loss
from .data import Row, column, limited, load_splits, place, texts
from .labels import class_name, count, labels_of, ordered, spellings, unlearned
from .metrics import FOR_SCORES, METRICS, confused, measure, try_metrics
from .pretrained import pretrained
from .recipe import Answered, Recipe, Shown, batched_logits, refuse_other_labels, some, task_of
from .text_classification_config import GLUE, LABEL, RAW_SCORE, TextClassificationConfig


class TextClassification(Recipe):
    """Adapts an encoder to texts with labels."""

    Config = TextClassificationConfig
    title = "Text classification"
    example = {
        "model": "FacebookAI/roberta-base",
        "adapter": {"method": "spectral_a", "r": 8, "target_modules": ["query", "key", "value"]},
        "data": {"glue": "sst2", "max_tokens": 128},
        "training": {"epochs": 3, "batch_size": 32},
    }
    config: TextClassificationConfig

    @property
    def task_type(self) -> str:  # type: ignore[override]
        """PEFT's name of the task."""
        return "TOKEN_CLS" if self.config.pooling == "mean" else "SEQ_CLS"

    @cached_property
    def processing(self) -> Any:
        tokenizer = load_tokenizer(self.config.model, self.config.revision)
        if tokenizer.pad_token is None:  # as in decoders; a classifier never learns from padding
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def everything(self) -> dict[str, list[Row]]:
        """Every row of every split, before limits: the classes are counted here."""
        return load_splits(self.config.data, self.config.seed)

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        return limited(self.everything, self.config.data, self.config.seed)

    @property
    def label_column(self) -> str:
        """The column of the label: the configured one, or `score` in GLUE's own STS-B files."""
        asked, first = self.config.data.label, self.everything["train"][0]
        return RAW_SCORE if asked == LABEL and self.config.data.glue == "stsb" and asked not in first else asked

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes, sorted (as numbers if all are); a single one for scores."""
        if self.config.scores:
            return ["score"]
        names = set(labels_of(self.everything["train"], self.label_column, "train", False))
        if self.config.data.labels is not None:
            return self._given_labels([class_name(name) for name in self.config.data.labels], names)
        if len(names) < 2:
            raise DataError(
                f"column {self.label_column!r}: at least two classes are needed, but it has only {sorted(names)}. "
                f"Add examples."
            )
        return ordered(names)

    def _given_labels(self, given: list[str], names: set[str]) -> list[str]:
        unknown = sorted(names - set(given))
        if unknown:
            raise DataError(f"data.labels: train has the class {unknown[0]!r}, which is not in the list. Add it.")
        if len(set(given)) < len(given):
            raise DataError("data.labels: a class occurs twice in the list. Name each once.")
        return given

    def classes(self) -> dict[str, dict[str, int]]:
        if self.config.scores:
            return {}
        return count(self.labels, {s: labels_of(part, self.label_column, s, False) for s, part in self.splits.items()})

    def warnings(self) -> list[str]:
        if self.config.scores:
            return []
        values = [value for s, part in self.everything.items() for value in column(part, self.label_column, s)]
        return [*spellings(values), *unlearned(self.classes()), *self._empty_texts()]

    def _empty_texts(self) -> list[str]:
        said = []
        for split, part in self.splits.items():
            empty = [i for i, row in enumerate(part) if not any(str(row[c]).strip() for c in self.config.data.columns)]
            if empty:
                said.append(
                    f"{len(empty):,} of {len(part):,} texts of {split} are empty (such as {part[empty[0]].where})"
                )
        return said

    def build_model(self, weights: Path | None = None) -> nn.Module:
        names = dict(enumerate(self.labels))
        options: dict[str, Any] = {"num_labels": len(names)}
        if not self.config.scores:
            options |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
            options |= {"problem_type": "single_label_classification"}
        else:
            options |= {"problem_type": "regression"}
        if self.config.dropout is not None:
            options |= dict.fromkeys(self._dropouts(weights), self.config.dropout)
        mean = self.config.pooling == "mean"
        kind = AutoModelForTokenClassification if mean else AutoModelForSequenceClassification
        model: Any = pretrained(kind, self.config, weights, self.head, **options)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.processing.pad_token_id
        built: nn.Module = model
        return built

    def _dropouts(self, weights: Path | None) -> list[str]:
        """Get the names of the dropouts in the model's config, which some modules read at every step."""
        found: Any = pretrained(AutoConfig, self.config, weights)
        named = [name for name in found.to_dict() if "dropout" in name or name.endswith("pdrop")]
        return [name for name in named if type(getattr(found, name)) in (int, float, type(None))]

    def head(self, model: nn.Module) -> list[str]:
        names = [name for name in self.config.new_heads if hasattr(model, name)]
        if not names:
            raise OptionError(
                f"model: {type(model).__name__} has no head named classifier or score. Choose another model."
            )
        return names

    def task(self, model: nn.Module) -> Task:
        return task_of(model, "mean" if self.config.pooling == "mean" else None)

    def load(self, tuned: Path) -> nn.Module:
        refuse_other_labels(tuned, self.labels)
        return super().load(tuned)

    def ready(self, split: str) -> None:
        self.rows(split)
        try_metrics(self.metrics, self.targets(split), None if self.config.scores else len(self.labels))

    def rows(self, split: str) -> list[dict[str, Any]]:
        if split not in self._rows:
            self._rows[split] = self._tokenised(split)
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _tokenised(self, split: str) -> list[dict[str, Any]]:
        data = self.config.data
        columns = [texts(self.splits[split], name, split) for name in data.columns]
        tokens = self.processing(*columns, truncation=True, max_length=data.max_tokens)
        for i in (i for i, ids in enumerate(tokens["input_ids"]) if not ids):
            # Where a tokenizer adds nothing to a text, an empty one has no token, and a batch of them no model reads.
            alone = {"input_ids": self.processing.pad_token_id, "attention_mask": 1}
            for name in tokens:
                tokens[name][i] = [alone.get(name, 0)]
        targets = self.targets(split)
        return [{**{k: v[i] for k, v in tokens.items()}, "labels": target} for i, target in enumerate(targets)]

    def targets(self, split: str) -> list[Any]:
        """Get the index of each example's class, or its score."""
        found = labels_of(self.splits[split], self.label_column, split, self.config.scores)
        if self.config.scores:
            return found
        numbers = {name: number for number, name in enumerate(self.labels)}
        unknown = [i for i, name in enumerate(found) if name not in numbers]
        if unknown:
            where = place(self.splits[split][unknown[0]], split, unknown[0])
            known = "occur in train" if self.config.data.labels is None else "occur in data.labels"
            raise DataError(
                f"{where}: the class {found[unknown[0]]!r} does not {known} ({len(unknown)} such rows in {split}). "
                f"Correct it, or add it there."
            )
        return [numbers[name] for name in found]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(DataCollatorWithPadding(self.processing)(rows))

    def logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return sentence_logits(model, batch) if self.config.pooling == "mean" else super().logits(model, batch)

    @property
    def loss(self) -> Loss | None:
        return self._mean_loss if self.config.pooling == "mean" else None

    def _mean_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits_BL = sentence_logits(model, batch)
        if self.config.scores:
            return nn.functional.mse_loss(logits_BL.squeeze(-1), batch["labels"].to(logits_BL))
        return nn.functional.cross_entropy(logits_BL, batch["labels"])

    def predict(self, model: nn.Module, split: str, places: Sequence[int] | None = None) -> list[Any]:
        """Get the index of the likeliest class, or the score, of each example."""
        rows = self.rows(split)
        rows = rows if places is None else [rows[i] for i in places]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        logits_NL = batched_logits(self, model, rows, order)
        found: list[Any] = (logits_NL.squeeze(-1) if self.config.scores else logits_NL.argmax(-1)).tolist()
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics of this run; `OptionError` for one that does not fit the problem."""
        task = GLUE[self.config.data.glue] if self.config.data.glue else None
        default = list(task.metrics) if task else list(FOR_SCORES) if self.config.scores else ["accuracy"]
        asked: list[str] = [*self.config.evaluation.metrics] or default
        fitting = FOR_SCORES if self.config.scores else [name for name in METRICS if name not in FOR_SCORES]
        for name in asked:
            if name not in fitting:
                kind = "scores" if self.config.scores else "classes"
                raise OptionError(
                    f"evaluation.metrics: {name!r} does not fit {kind}. Choose from: {', '.join(fitting)}."
                )
        return asked

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return measure(self.metrics, self.predict(model, split), self.targets(split))

    def confusion(self, model: nn.Module, split: str) -> tuple[list[str], list[list[int]]] | None:
        if self.config.scores:
            return None
        return self.labels, confused(self.predict(model, split), self.targets(split), len(self.labels))

    def show(self) -> Shown:
        row = self.rows("train")[0]
        pieces = [(f"{piece} ", False) for piece in self.processing.convert_ids_to_tokens(row["input_ids"])]
        answer = f"{row['labels']:g}" if self.config.scores else self.labels[row["labels"]]
        return Shown(pieces, answer)

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        places = some(self.splits[split], count, self.config.seed)
        name = (lambda value: f"{value:.2f}") if self.config.scores else (lambda value: self.labels[value])
        targets, found = self.targets(split), self.predict(model, split, places)
        shown = [" | ".join(str(self.splits[split][i][c]) for c in self.config.data.columns) for i in places]
        return [Answered(t, name(targets[i]), name(f)) for t, i, f in zip(shown, places, found, strict=True)]


def sentence_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Get the logits of each sentence: the mean of its tokens' logits, without padding."""
    mask_BN1 = batch["attention_mask"][..., None]
    logits_BNL = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return (logits_BNL * mask_BN1).sum(1) / mask_BN1.sum(1)

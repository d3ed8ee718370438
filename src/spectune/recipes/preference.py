"""Language models on preferences, by trl's DPO, KTO and ORPO; the reference is the base, with the adapter off."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import DataError
from ..training.arguments import checked_arguments, loop_arguments
from ..training.config import NO_ADAPTER
from ..training.loop import Plan, looped
from .causal_lm import CausalLM
from .data import Row, limited, load_splits
from .preference_config import PreferenceConfig
from .preference_rows import preferences
from .recipe import Answered, Shown
from .tokens import IGNORED, Tokens
from .trl_trainers import from_trl, on_tokens, refuse_moved, trl_trainer

# What trl calls them -> a run's names.
METRICS = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "loss": "loss",
}


class Preference(CausalLM):
    """Adapts a language model to preferences: pairs of a better and a worse answer, or answers with a label."""

    Config = PreferenceConfig  # type: ignore[assignment]
    title = "Preferences"
    curves = {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    example = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "adapter": {"method": "spectral_a", "r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "data": {
            "hub": "trl-lib/ultrafeedback_binarized",
            "train": "train",
            "test": "test",
            "format": "messages",
        },
        "loss": "sigmoid",
        "beta": 0.1,
        "training": {"epochs": 1, "batch_size": 4, "gradient_accumulation": 4, "precision": "bfloat16"},
    }
    config: PreferenceConfig  # type: ignore[assignment]

    @property
    def sides(self) -> tuple[str, ...]:
        """The columns with answers."""
        return ("completion",) if self.config.labelled else ("chosen", "rejected")

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        data, seed = self.config.data, self.config.seed
        rows = limited(load_splits(data, seed), data, seed)
        found = {s: preferences(part, data, self.config.labelled, s) for s, part in rows.items()}
        if self.config.labelled:  # trl reads them in their order, and files are often sorted by label
            random.Random(seed).shuffle(found["train"])
        return found

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.processing, "response")

    def ready(self, split: str) -> None:
        self.rows(split)

    def wanted(self, split: str) -> list[Row]:
        return [self._answers(row)[0] for row in self.splits[split] if row.get("label", True)]

    def learned(self, split: str) -> list[Row]:
        return [answer for row in self.splits[split] for answer in self._answers(row)]

    def _answers(self, row: Row) -> list[Row]:
        return [Row(row | {"completion": row[side]}, row.where) for side in self.sides]

    def tokenised(self, row: Row, whole: bool = False) -> dict[str, Any]:
        """Get the tokens of the prompt and of each answer, and `input_ids` and `labels` of the longer one."""
        end = None if whole else self.config.data.max_tokens
        taught = [self.tokens.taught(answer) for answer in self._answers(row)]
        start = min(sum(label == IGNORED for label in labels) for _, labels in taught)
        found = {f"{side}_ids": ids[start:end] for side, (ids, _) in zip(self.sides, taught, strict=True)}
        ids, labels = max(taught, key=lambda one: len(one[0]))
        more = {"label": row["label"]} if self.config.labelled else {}
        return {"prompt_ids": ids[:start][:end], **found, **more, "input_ids": ids[:end], "labels": labels[:end]}

    def _all_tokenised(self, split: str) -> list[dict[str, Any]]:
        found = [self.tokenised(row) for row in self.splits[split]]
        kept = [row for row in found if all(_sides_of(row, self.sides)) and _differ(_sides_of(row, self.sides))]
        if not kept:
            raise DataError(f"data.{split}: no answer fits into max_tokens={self.config.data.max_tokens}. Raise it.")
        return kept

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Get every answer of some rows in one batch."""
        return super().collate(
            [
                {
                    "input_ids": row["prompt_ids"] + ids,
                    "labels": [IGNORED] * len(row["prompt_ids"]) + ids,
                }
                for row in rows
                for ids in _sides_of(row, self.sides)
            ]
        )

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        held_out = None if self.config.training.validate_every is None else self.rows(self.validation_split())
        made = self._trainer(model, plan, folder, callbacks, self.rows("train"), held_out, **more)
        if self.config.loss != "orpo" and self.config.adapters and not made.is_fsdp_enabled:
            refuse_moved(made.model, self.collate(self.rows("train")[:1]))
        return made

    def _trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback],
        train: list[dict[str, Any]], held_out: list[dict[str, Any]] | None, **more: Any,
    ) -> Any:  # fmt: skip
        config, size = self.config, self.config.training.batch_size
        name = "KTO" if config.labelled else "ORPO" if config.loss == "orpo" else "DPO"
        module = "trl.experimental.orpo" if name == "ORPO" else "trl"
        kind, arguments, _ = from_trl("preference", f"{name}Trainer", f"{name}Config", module=module)
        own: dict[str, Any] = {"max_length": config.data.max_tokens, "beta": config.beta, "disable_dropout": True}
        if name == "DPO":
            own |= {"loss_type": [config.loss], "label_smoothing": config.label_smoothing or 0.0}
        if name == "KTO":
            own |= {"loss_type": config.loss, "train_sampling_strategy": "sequential"}
            own |= {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
        whole = config.adapter == NO_ADAPTER and name != "ORPO"
        return trl_trainer(
            looped(on_tokens(kind)),
            checked_arguments(arguments, loop_arguments(config, folder) | own | more),
            model=model,
            train_dataset=self._dataset(train, size),
            eval_dataset=None if held_out is None else self._dataset(held_out, size),
            processing_class=self.processing,
            callbacks=list(callbacks),
            plan=plan,
            **({"ref_model": self.build_model()} if whole else {}),
        )

    def _dataset(self, rows: list[dict[str, Any]], size: int) -> Any:
        """Get rows in the form of the trainer; in a batch of `size`, KTO gives each prompt another answer."""
        (dataset,) = from_trl("preference")
        if self.config.loss == "orpo":
            return dataset.from_list([_for_orpo(row) for row in rows])
        names = [name for name in rows[0] if name not in ("input_ids", "labels")]
        found = [{name: row[name] for name in names} for row in rows]
        if self.config.loss == "kto":
            for start in range(0, len(found), size):
                batch = found[start : start + size]
                for row, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
                    row["KL_completion_ids"] = before["completion_ids"]
        return dataset.from_list(found)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows, total = self.rows(split), dict.fromkeys(METRICS.values(), 0.0)
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"report_to": [], "eval_strategy": "no", "gradient_checkpointing": False}
            trainer = self._trainer(model, Plan(()), Path(folder), (), rows, None, **quiet)
            for part, size in _even(rows, self.config.evaluation.batch_size):
                trainer.args.per_device_eval_batch_size = size
                found = trainer.evaluate(self._dataset(part, size))
                for theirs, name in METRICS.items():
                    total[name] += found.get(f"eval_{theirs}", float("nan")) * len(part) / len(rows)
        return {name: value for name, value in total.items() if value == value}

    def show(self) -> Shown:
        row = self.tokenised(self.splits["train"][0])
        pieces = self.pieces(row["prompt_ids"], [IGNORED] * len(row["prompt_ids"]))
        for side in self.sides:
            name = f"label {row['label']}" if self.config.labelled else side
            pieces += [(f"\n[{name}] ", False), *self.pieces(row[f"{side}_ids"], row[f"{side}_ids"])]
        return Shown(pieces)

    def warnings(self) -> list[str]:
        said = super().warnings()
        labels = {row.get("label") for row in self.splits["train"]}
        if self.config.labelled and len(labels) == 1:
            said.append(f"every label of train is {labels.pop()}: {self.config.loss} needs answers of both kinds")
        return said

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        return []  # no written answer is right or wrong


def _sides_of(row: dict[str, Any], sides: Sequence[str]) -> list[list[int]]:
    return [row[f"{side}_ids"] for side in sides]


def _differ(answers: list[list[int]]) -> bool:
    """Ask whether a pair still differs when its ends are cut."""
    return len(answers) == 1 or answers[0] != answers[1]


def _for_orpo(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt_ids"]
    found = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        ids = prompt + row[f"{side}_ids"]
        labels = [IGNORED] * len(prompt) + row[f"{side}_ids"]
        found |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": [1] * len(ids)}
    return found


def _even(rows: list[Any], most: int) -> Iterator[tuple[list[Any], int]]:
    """Get one or two parts with their batch sizes, so that every batch is full.

    trl's figures are means over batches; of full batches they are means over examples.
    """
    batches = -(-len(rows) // most)
    small, larger = divmod(len(rows), batches)
    for start, end, size in ((0, larger * (small + 1), small + 1), (larger * (small + 1), len(rows), small)):
        if end > start:
            yield rows[start:end], size

"""`fit`: the train loop for rows and a loss in memory, without a run folder; what the demo trains with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .loop import Loss, OnStep, Plan, Watch, looped, one_device

WARMUP_STEPS = 10  # Chosen: enough for Adam's second moments to settle.


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

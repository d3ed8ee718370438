"""The one training loop of all recipes: transformers' Trainer, told what to train and at which rates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

OnStep = Callable[[int, int, float], None]
"""Called with (step, steps, loss) after each optimizer step."""
WARMUP_STEPS = 10  # Chosen: enough for Adam's second moments to settle.


def fit(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    loss: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor],
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
    optimizer = torch.optim.AdamW([{"params": list(p), "lr": lr} for p, lr in rates if p], weight_decay=0.0)
    watch = _Watch(steps, on_step)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            warmup_steps=min(WARMUP_STEPS, steps // 2),
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = _Trainer(
            loss,
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[watch],
        )
        # Its own callback prints every log line as a dict.
        trainer.pop_callback(
            next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
        )
        trainer.train()
    return watch.losses


class _Trainer(Trainer):
    """The Trainer with a loss of the recipe's own."""

    def __init__(self, loss: Callable[..., torch.Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._loss = loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self._loss(model, inputs)


class _Watch(TrainerCallback):
    def __init__(self, steps: int, on_step: OnStep | None) -> None:
        self.steps, self.on_step, self.losses = steps, on_step, list[float]()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if self.on_step is not None:
                self.on_step(state.global_step, self.steps, self.losses[-1])

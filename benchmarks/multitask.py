"""One LoRA trained on several tasks at once, each with its own head: what merged adapters are compared with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from spectune.runs import load_run

Task = tuple[Any, Any]
"""A recipe and its model, whose body is shared."""


def trained_together(heads: Sequence[Path], lora: LoraConfig, rate: float, head_rate: float, epochs: int) -> list[Task]:
    """Get each task's recipe and model after training one adapter on the rows of all.

    `heads` are runs that fitted a head on the untouched body. Batches are of one task each, in a mixed order; the loss
    is each task's own. AdamW without weight decay, 6% warmup, a linear fall, gradients clipped to 1: a run's defaults.
    """
    tasks: list[Task] = [load_run(folder) for folder in heads]
    body = get_peft_model(tasks[0][1].bert, lora)
    for _, model in tasks:
        model.bert = body
        model.classifier.requires_grad_(True)
    factors = [one for one in body.parameters() if one.requires_grad]
    tops = [one for _, model in tasks for one in model.classifier.parameters()]
    optimizer = torch.optim.AdamW([{"params": factors, "lr": rate}, {"params": tops, "lr": head_rate}], weight_decay=0)
    drawn = random.Random(heads[0].name)
    batches = [batch for _ in range(epochs) for batch in _mixed(tasks, drawn)]
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * len(batches)), len(batches))
    for at, (place, rows) in enumerate(batches):
        recipe, model = tasks[place]
        model.train()
        loss = recipe.loss(model, recipe.collate(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*factors, *tops], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if at % 100 == 0:
            print(f"step {at} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    return [(recipe, model.eval()) for recipe, model in tasks]


def _mixed(tasks: Sequence[Task], drawn: random.Random) -> Iterator[tuple[int, list[Any]]]:
    """Get (task, rows) of all batches of an epoch, in a mixed order."""
    batches = []
    for place, (recipe, _) in enumerate(tasks):
        rows, size = list(recipe.plain_rows("train")), recipe.config.training.batch_size
        drawn.shuffle(rows)
        batches += [(place, rows[at : at + size]) for at in range(0, len(rows), size)]
    drawn.shuffle(batches)
    yield from batches

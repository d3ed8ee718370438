"""`scores_of`: how much a run's task would miss each singular direction of a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import read_lora
from ..extraction import calibrated
from ..runs.company import EXAMPLES, batches_of, load_with

# Squares of the gradients of small batches say more of each example than those of large ones. Chosen.
AT_ONCE = 8


def scores_of(
    run: str | Path, lora: str | Path, count: int = EXAMPLES, on_batch: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Get layer -> a score for each direction of a LoRA, by the loss of a run's training examples (`calibrated`).

    The run gives task, head and base; the LoRA may be its own or another of the same base.
    """
    source = read_lora(lora)
    recipe, model = load_with(run, source.path)
    device, batches = next(model.parameters()).device, batches_of(recipe, count, AT_ONCE)

    def told() -> Iterator[dict[str, Any]]:
        for done, batch in enumerate(batches, 1):
            yield {name: tensor.to(device) for name, tensor in batch.items()}
            if on_batch is not None:
                on_batch(done, len(batches))

    def loss(tuned: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = tuned(**batch).loss if recipe.loss is None else recipe.loss(tuned, batch)
        return found

    return calibrated(model, source, told(), loss)

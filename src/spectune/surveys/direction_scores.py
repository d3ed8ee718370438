"""`scores_of`: how much a run's task would miss each singular direction of a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import LoraFile, read_lora
from ..errors import AdapterError
from ..extraction import calibrated
from ..runs.company import load_with
from ..runs.drawn_examples import EXAMPLES, batches_of
from ..runs.folder import Run

# Squares of the gradients of small batches say more of each example than those of large ones. Chosen.
AT_ONCE = 8


def scores_of(
    run: str | Path, lora: str | Path, count: int = EXAMPLES, on_batch: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Get layer -> a score for each direction of a LoRA, by the loss of a run's training examples (`calibrated`).

    The run gives task, head and base; the LoRA may be its own or another of the same base. `AdapterError` for one of
    another base, and for a single file: what PEFT attaches is a folder.
    """
    source = read_lora(lora)
    _refuse_another_base(Path(run), source)
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


def _refuse_another_base(run: Path, source: LoraFile) -> None:
    if not source.config:
        raise AdapterError(f"{source.path}: calibration needs a PEFT folder, and this is a single file.")
    base, named = Run.open(run).config().model, source.config.get("base_model_name_or_path")
    if named and Path(named).name != Path(base).name:
        raise AdapterError(
            f"{source.path}: this LoRA is of {named}, and the run {run} has {base}. Name a run with the LoRA's base."
        )

"""What a language model forgets: its loss on text unrelated to the task, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..recipes.data import column, hub_split, read_rows
from ..training.config import DataSection
from .config import GeneralText

WINDOW = 512  # tokens that are read together, in reach of every model of today; chosen


@torch.no_grad()
def general_loss(model: nn.Module, tokenizer: Any, asked: GeneralText) -> float:
    """Get the mean negative log likelihood of a token of general text, in nats.

    The text is cut into windows that do not overlap, so the first token of each is not predicted. The loss after
    tuning minus the base model's is `forgetting` in PEFT's method_comparison.
    """
    model.eval()
    config: Any = getattr(model, "config", None)
    window = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    ids = tokenizer(read_text(asked), add_special_tokens=False, verbose=False)["input_ids"][: asked.tokens]
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part_1N = torch.tensor([ids[start : start + window]], device=device)
        if part_1N.shape[1] < 2:
            break
        logits_NV = model(input_ids=part_1N).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits_NV, part_1N[0, 1:], reduction="sum"))
        count += part_1N.shape[1] - 1
    if not count:
        raise DataError(f"forgetting: {asked.file or asked.hub} has only {len(ids)} tokens. Give a longer text.")
    return total / count


def read_text(asked: GeneralText) -> str:
    """Get the text, rows joined by empty lines."""
    if asked.hub is not None:
        found = hub_split(DataSection.model_validate({"hub": asked.hub, "hub_config": asked.hub_config}), asked.split)
        return "\n\n".join(str(row["text"]) for row in found)
    path = Path(str(asked.file))
    if path.suffix == ".txt" and path.is_file():
        return path.read_text("utf-8")
    return "\n\n".join(str(text) for text in column(read_rows(path), "text", "forgetting"))

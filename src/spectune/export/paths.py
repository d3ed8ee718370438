"""The paths of a base model inside of what PEFT and torch.compile wrap around it."""

from __future__ import annotations

from torch import nn

from ..checkpoint import PEFT_PREFIX


def base_path(model: nn.Module, path: str) -> str:
    """Get the path of a module in the base model, without what PEFT and torch.compile add to it."""
    path = path.removeprefix("_orig_mod.").replace(".base_layer", "")
    return path.removeprefix(PEFT_PREFIX) if hasattr(model, "get_base_model") else path

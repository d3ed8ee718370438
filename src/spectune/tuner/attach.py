"""The two doors through which recipes and commands reach PEFT."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Get the model with a new adapter of any PEFT method; its weights are frozen, the adapter trains."""
    return get_peft_model(model, config)


def load_attached(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Get the model with a saved adapter of any PEFT method."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)

"""The doors through which recipes and commands reach PEFT: attach, load, swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from ..checkpoint import read_adapter_folder
from ..errors import AdapterError
from ..methods import spectral_modules
from .config import SpectralConfig


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Get the model with a new adapter of any PEFT method; its weights are frozen, the adapter trains."""
    return get_peft_model(model, config)


def load_attached(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Get the model with a saved adapter of any PEFT method."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def swap_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Replace the numbers of a live adapter by those of a saved one, in place.

    Tensors keep their identity, so a compiled model need not be compiled again. The saved adapter must have
    the same method, options and targets; `AdapterError` otherwise, and nothing is changed. No singular value
    decomposition is done: the bases that stand in the model are turned onto the saved sketches.
    """
    saved = read_adapter_folder(folder).require("SPECTUNE")
    present = model.peft_config[adapter_name]
    incoming = SpectralConfig.from_pretrained(str(folder))
    if incoming.build_method() != present.build_method():
        raise AdapterError(
            f"{folder}: asked to swap in {incoming.build_method()}, the model holds {present.build_method()}. "
            f"Load it as another adapter."
        )
    mine = {
        f"{layer.removeprefix('base_model.model.')}.spectune_adapter.{tensor}": value.shape
        for layer, name, module in spectral_modules(model)
        if name == adapter_name
        for tensor, value in module.state_dict().items()
    }
    theirs = {name.removeprefix("base_model.model."): torch.Size(shape) for name, shape in saved.shapes.items()}
    different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    different = [name for name in different if ".spectune_adapter." in name]
    if different:
        raise AdapterError(
            f"{folder}: asked to swap into adapter {adapter_name!r}, but {len(different)} tensors differ, the first is "
            f"{different[0]!r}. Load it as another adapter."
        )
    set_peft_model_state_dict(model, {name: saved.tensor(name) for name in saved.names}, adapter_name)

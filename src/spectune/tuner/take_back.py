"""Takes an adapter that could not be attached out of a model again, which is then as it was."""

from __future__ import annotations

from torch import nn

from .experts import SpectralExpert, SpectralParameters
from .layer import SpectralLayer


def take_back(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter where it has been attached, and put the model's own layers back where it was the only one."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpectralParameters):
            layer.delete_adapter(adapter_name)
            unused = layer.drop_empty()
        elif isinstance(layer, SpectralLayer) and adapter_name in layer.spectune_adapter:
            layer.delete_adapter(adapter_name)
            unused = not layer.spectune_adapter and not isinstance(layer, SpectralExpert)
        else:
            continue
        if unused:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)

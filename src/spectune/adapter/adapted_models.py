"""How the other rooms find the spectral adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..errors import AdapterError
from .modules import SpectralModule

# The attribute under which a layer keeps {adapter name: SpectralModule}. Exports and dynamics look
# for it, so they need not know the layer classes.
ADAPTERS_ATTRIBUTE = "spectune_adapter"


def spectral_modules(model: nn.Module) -> Iterator[tuple[str, str, SpectralModule]]:
    """Get (layer name, adapter name, module) for every spectral adapter in a model."""
    for layer_name, layer in model.named_modules():
        for adapter_name, module in getattr(layer, ADAPTERS_ATTRIBUTE, {}).items():
            yield layer_name, adapter_name, module


def bases_as_parameters(model: nn.Module) -> int:
    """Get how many adapters of a model now keep their frozen bases as parameters; call it before `fully_shard`.

    FSDP2 shards parameters and copies buffers to every process; a basis is a buffer, so that DDP and PEFT leave it
    alone. Raises `AdapterError` for a method whose weights share trained numbers: each would belong to two shards.
    """
    found = [module for _, _, module in spectral_modules(model)]
    for module in found:
        if module.method.shared_shapes():
            raise AdapterError(
                f"{module.name}: {module.method.name} trains numbers that all adapted weights share, and FSDP2 shards "
                f"each layer for itself. Set shared_core to false, or use DDP."
            )
        module.bases_as_parameters()
    return len(found)

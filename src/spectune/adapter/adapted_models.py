"""Finding the spectral adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from ..errors import AdapterError, OptionError, nearest
from .dynamics import Dynamics, refuse_second_decay
from .modules import SpectralModule
from .rules import GRADIENT_NORMS

# The attribute in which a layer keeps {adapter name: SpectralModule}. Exports look for it and need no layer classes.
ADAPTERS_ATTRIBUTE = "spectune_adapter"


def spectral_modules(model: nn.Module) -> Iterator[tuple[str, str, SpectralModule]]:
    """Get (layer name, adapter name, module) for every spectral adapter in a model."""
    for layer_name, layer in model.named_modules():
        for adapter_name, module in getattr(layer, ADAPTERS_ATTRIBUTE, {}).items():
            yield layer_name, adapter_name, module


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in eval mode; afterwards each module is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def bases_as_parameters(model: nn.Module) -> int:
    """Turn frozen bases into parameters, and get the number of adapters; call it before `fully_shard`.

    FSDP2 and ZeRO-3 shard parameters and copy buffers to every process; normally a basis is a buffer, so that DDP and
    PEFT leave it alone. Raises `AdapterError` for a method whose weights share trained numbers: they shard by layer.
    """
    found = [module for _, _, module in spectral_modules(model)]
    for module in found:
        if module.method.shared_by():
            raise AdapterError(
                f"{module.name}: {module.method.name} trains numbers that several weights share, and FSDP2 and "
                f"ZeRO-3 shard each layer for itself. Set shared_core to false (specadapt) or leave share out, or use "
                f"DDP."
            )
        module.bases_as_parameters()
    return len(found)


def attach_dynamics(
    optimizer: Optimizer, model: nn.Module, *, singular_decay: float = 0.0, grad_norm: str | None = None
) -> int:
    """Apply the rules at each step of the optimizer, and get the number of spectral modules that follow them.

    `singular_decay` and `grad_norm` in a `SpectralConfig` do the same without this call. The rules run
    right before the optimizer's own step: after gradient accumulation, synchronisation, unscaling and
    clipping, and not at all when a scaler skips the step.

    Raises `OptionError` for an unknown norm, a model without spectral adapters, or an optimizer that
    decays the same numbers a second time.
    """
    if grad_norm is not None and grad_norm not in GRADIENT_NORMS:
        raise OptionError(f"grad_norm={grad_norm!r} does not exist. {nearest(grad_norm, list(GRADIENT_NORMS))}")
    modules = [module for _, _, module in spectral_modules(model)]
    if not modules:
        raise OptionError("attach_dynamics: the model has no spectral adapter. Attach one first.")
    for module in modules:
        module.dynamics = Dynamics(singular_decay, grad_norm)
        refuse_second_decay(optimizer, module)
    return len(modules)

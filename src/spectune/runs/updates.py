"""`layer_updates`: how far each adapted layer of a live model moved, with any method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..adapter import is_cut, spectral_modules
from ..algebra import dense
from ..checkpoint import PEFT_PREFIX
from .result import LayerMove

# Rows of the identity per forward of another method's layer: bounds the memory. Chosen.
ROWS = 512


@torch.no_grad()
def layer_updates(model: nn.Module) -> list[LayerMove]:
    """Get |dW|_F and |W|_F of every adapted layer, in the model's order.

    A spectral layer's dW is the sum of its active adapters at their strength. Any other adapted linear layer (LoRA,
    DoRA, OFT, …) maps the identity with and without its adapter, so that dW is its effect, whatever it stores. Other
    layers of other methods, and sharded models, are left out.
    """
    if any(is_cut(p) for p in model.parameters()):
        return []
    training = model.training
    model.eval()  # dropout is not part of an update
    try:
        return [
            LayerMove(name=name.replace(PEFT_PREFIX, "", 1), moved=norms[0], norm=norms[1])
            for name, norms in _norms(model)
        ]
    finally:
        model.train(training)


def _norms(model: nn.Module) -> Iterator[tuple[str, tuple[float, float]]]:
    spectral: dict[str, list[Any]] = {}
    for path, adapter, module in spectral_modules(model):
        modules = spectral.setdefault(path, [])
        if adapter in getattr(model.get_submodule(path), "active_adapters", [adapter]):
            modules.append(module)
    for name, layer in model.named_modules():
        if name in spectral:
            W_OI = layer.original_matrix().float()  # type: ignore[operator]
            dW_OI = sum((dense(m.delta()).to(W_OI) for m in spectral[name]), torch.zeros_like(W_OI))
            yield name, (float(dW_OI.norm()), float(W_OI.norm()))
        elif hasattr(layer, "get_base_layer") and isinstance(layer.get_base_layer(), nn.Linear):
            yield name, _asked(layer)


def _asked(layer: Any) -> tuple[float, float]:
    base = layer.get_base_layer()
    weight = base.weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    moved = total = 0.0
    for start in range(0, base.in_features, ROWS):
        count = min(ROWS, base.in_features - start)
        x_NI = torch.zeros(count, base.in_features, dtype=dtype, device=weight.device)
        x_NI[torch.arange(count), torch.arange(start, start + count)] = 1
        y_NO, tuned_NO, shift_O = base(x_NI).float(), layer(x_NI).float(), base(torch.zeros_like(x_NI[:1])).float()
        moved += float((tuned_NO - y_NO).square().sum())
        total += float((y_NO - shift_O).square().sum())
    return moved**0.5, total**0.5

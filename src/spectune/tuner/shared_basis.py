"""Directions of data in an adapter's file: left out where adapters share them, and else in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapter import ADAPTERS_ATTRIBUTE, BASIS, is_cut, spectral_modules
from ..checkpoint import PEFT_PREFIX


def basis_apart(model: nn.Module, config: Any) -> tuple[set[str], set[str]]:
    """Get the names of the live tensors that a file of adapters leaves out, and of those that it keeps in bfloat16.

    The second are those that are rounded to it already, as `spectune.prepare` finds them.
    """
    shared: set[str] = set()
    halved: set[str] = set()
    for layer, adapter, module in spectral_modules(model):
        if module.source != "weight":
            stem = f"{layer}.{ADAPTERS_ATTRIBUTE}.{adapter}."
            if config.basis_id is not None:
                shared |= {stem + name for name in BASIS}
            else:
                halved |= {stem + name for name in ("U_OR", "Vh_RI") if _is_rounded(getattr(module, name))}
    return shared, halved


def with_basis(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Get the tensors of a file with the directions that it shares, those that it keeps in bfloat16 in float32."""
    prefix = PEFT_PREFIX if any(name.startswith(PEFT_PREFIX) for name in state_dict) else ""
    found = dict(state_dict)
    for path, adapter, module in spectral_modules(model):
        if adapter == adapter_name and module.source != "weight":
            layer = path.removeprefix(PEFT_PREFIX)
            for name in BASIS:
                key = f"{prefix}{layer}.{ADAPTERS_ATTRIBUTE}.{name}"
                if config.basis_id is not None and config.spectra is not None and layer in config.spectra:
                    found.setdefault(key, getattr(config.spectra[layer], name))
                if key in found and found[key].dtype == torch.bfloat16:
                    found[key] = found[key].float()
    return found


def _is_rounded(tensor: torch.Tensor) -> bool:
    return not is_cut(tensor) and torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor)

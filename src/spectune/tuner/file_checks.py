"""Check the tensors of an adapter file against the model before anything is loaded."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter import SpectralModule, spectral_modules
from ..checkpoint import PEFT_PREFIX
from ..errors import AdapterError


def refuse_non_finite(state_dict: dict[str, torch.Tensor]) -> None:
    """Raise `AdapterError` for NaN or infinity in a file, which would make every answer nonsense."""
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{name.removeprefix('base_model.model.')}: contains NaN or infinity. Train or copy the adapter again."
            )


def refuse_surplus(model: nn.Module, adapter_name: str, in_file: set[str]) -> None:
    """Raise `AdapterError` for tensors of layers that the config does not adapt, which would be silently dropped."""
    places = {
        f"{layer.removeprefix(PEFT_PREFIX)}.spectune_adapter.{tensor}"
        for layer, name, module in spectral_modules(model)
        if name == adapter_name
        for tensor in module.state_dict()
    }
    left = sorted(key for key in in_file - places if ".spectune_adapter." in key)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise AdapterError(
            f"{left[0]}{more}: the adapter file has this tensor, but the model has no adapted layer for it. The config "
            f"was changed after saving, or the base is another model. Load the adapter as it was saved."
        )


def expect_what_the_file_has(layer_name: str, module: SpectralModule, in_file: set[str]) -> None:
    stem = f"{layer_name}.spectune_adapter."
    module.embed_basis(stem + "U_OR" in in_file)
    for tensor in module.state_dict():
        if stem + tensor not in in_file and tensor not in module.found_names:
            raise AdapterError(
                f"{layer_name}: the adapter file has no tensor {stem + tensor!r}: it is incomplete, or it was not "
                f"written for this model and method. Export or copy the adapter again."
            )

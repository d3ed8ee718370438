"""What an export reads from a live model: its adapted layers, and the modules that were trained in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapter import SpectralModule, spectral_modules
from ..checkpoint import PEFT_PREFIX
from ..errors import ExportError, nearest
from ..records import Delta, SparseCore
from .paths import base_path as base_path
from .stacked import StackPlace, stack_place

# PEFT refuses a LoRA on these layers of these models (tuners_utils.py, _check_lora_target_modules_mamba).
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
READ_BY_KERNELS = ("out_proj", "conv1d")


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """One layer with the adapter: its path in the base model, and the module that holds the update."""

    name: str
    module: SpectralModule
    fan_in_fan_out: bool
    """True if the layer stores its weight in x out (transformers' Conv1D)."""
    place: StackPlace | None = None
    """Where the layer is one matrix of a stored stack (target_parameters): which one, of what."""

    @property
    def target(self) -> str:
        """The name by which PEFT targets it: the layer's, or that of the parameter which it is a part of."""
        return self.name if self.place is None else self.place.parameter

    @property
    def key(self) -> str:
        """The path under which PEFT keeps the factors in a file."""
        return self.name if self.place is None else self.place.key


def adapted_layers(model: nn.Module, adapter_name: str) -> list[AdaptedLayer]:
    """Get the layers that have an adapter; `ExportError` if one of them has no exact LoRA."""
    found = []
    for path, name, module in spectral_modules(model):
        if name == adapter_name:
            layer = model.get_submodule(path)
            place, base = stack_place(model, path, adapter_name), _base_of(layer)
            _refuse_inexact(base_path(model, path), layer, base if place is None else None)
            _refuse_what_peft_does(base_path(model, path), inner_model(model))
            found.append(AdaptedLayer(base_path(model, path), module, isinstance(base, Conv1D), place))
    return found


def choose_adapter(model: nn.Module, asked: str | None) -> str:
    """Get the name of the spectral adapter to export: the one named, or the only one."""
    names = sorted({name for _, name, _ in spectral_modules(model)})
    kind = type(model).__name__
    if not names:
        raise ExportError(f"{kind}: the model has no spectral adapter. Attach or load one first.")
    if asked is not None and asked not in names:
        raise ExportError(f"{kind}: the model has no spectral adapter {asked!r}. {nearest(asked, names)}")
    if asked is None and len(names) > 1:
        raise ExportError(
            f"{kind}: the model has several spectral adapters: {', '.join(names)}. Choose one with adapter_name."
        )
    return names[0] if asked is None else asked


def fully_trained(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Get the tensors of modules_to_save and the vectors of trained tokens, named as PEFT names them in a file."""
    tensors = {}
    for path, wrapper in model.named_modules():
        # PEFT's ModulesToSaveWrapper, known by its two parts.
        copies = wrapper._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict) and "original_module" in wrapper._modules and adapter_name in copies:
            stem = PEFT_PREFIX + base_path(model, path)
            for name, tensor in copies[adapter_name].state_dict().items():
                tensors[f"{stem}.{name}"] = tensor
        vectors = getattr(wrapper, "trainable_tokens_delta", {})
        if adapter_name in vectors and not path.endswith("tied_adapter"):
            tensors[f"{PEFT_PREFIX}{base_path(model, path)}.trainable_tokens_delta"] = vectors[adapter_name].detach()
    return tensors


def base_paths(model: nn.Module) -> Iterator[str]:
    """Get the path of every module of the base model, without any wrappers."""
    for path, _ in model.named_modules():
        if ".spectune_adapter" not in path:
            yield base_path(model, path)


def inner_model(model: Any) -> nn.Module:
    """Get the base model inside a PeftModel; any other model is returned as it is."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def in_double(delta: Delta) -> Delta:
    """Get the same update in float64, so that results are rounded only once, at the end."""
    core = delta.core
    wide = replace(core, values_C=core.values_C.double()) if isinstance(core, SparseCore) else core.double()
    return Delta(delta.left_OP.double(), wide, delta.right_QI.double())


def _base_of(layer: nn.Module) -> nn.Module:
    while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
        layer = inner
    return layer


def _refuse_what_peft_does(path: str, model: Any) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in MAMBAS and path.rpartition(".")[2] in READ_BY_KERNELS:
        raise ExportError(
            f"{path}: PEFT loads no LoRA on this layer of a {kind} model, whose kernels read its weight. Merge the "
            "adapter instead."
        )


def _refuse_inexact(path: str, layer: nn.Module, base: nn.Module | None) -> None:
    if base is not None and not isinstance(base, (nn.Linear, Conv1D)):
        raise ExportError(
            f"{path}: a {type(base).__name__} has no exact LoRA; only linear layers and Conv1D do. Merge the adapter "
            "instead."
        )
    if getattr(layer, "runs_own_forward", False):
        raise ExportError(
            f"{path}: a {type(base).__name__} does more with its weight than a matrix product, so it has no exact "
            "LoRA. Merge the adapter instead."
        )
    if getattr(layer, "is_only_read", False):
        raise ExportError(
            f"{path}: the model reads this layer's weight and never calls it, and a LoRA changes only what a call "
            "gives. Merge the adapter instead."
        )
    merged = getattr(layer, "merged_adapters", [])
    if merged:
        raise ExportError(
            f"{path}: {', '.join(merged)} is merged into the base, so the update cannot be read. Unmerge it first."
        )

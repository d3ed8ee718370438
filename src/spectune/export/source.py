"""What is exported: a live model, or a saved adapter loaded onto its base model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..adapter import SpectralModule, spectral_modules
from ..adapter.saved import tensors_by_layer
from ..checkpoint import AdapterFolder, Base, find_base, load_auto, read_adapter_folder
from ..checkpoint.pretrained import TELL_MISFITS, replaced
from ..errors import AdapterError, ExportError, SpectuneError, one_line
from .layers import base_path, choose_adapter, fully_trained, inner_model
from .lora_config import adapter_config
from .target import config_options, model_class
from .vocabulary import carried_keys, resize_for, resized_embeddings

# Files by which transformers itself finds the weights of a folder.
OF_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_NAME = "default"


@dataclass(frozen=True, eq=False)
class Source:
    """A live model with the adapter to export."""

    model: nn.Module = field(repr=False)
    adapter_name: str
    carried: dict[str, torch.Tensor] = field(repr=False)
    """Tensors trained in full (modules_to_save), under PEFT's names in a file."""
    base: Base | None = None
    """The base model, where it was loaded here."""


def open_source(adapter: nn.Module | str | Path, base_model: Any, adapter_name: str | None) -> Source:
    """Get the model to export from.

    A live model is used as it is. For a folder, the base is loaded, or `base_model` copied, and
    transformers loads the adapter onto it; the trained numbers are those of the file, unrounded.
    `ExportError` or `AdapterError` names what is missing.
    """
    if isinstance(adapter, nn.Module):
        if base_model is not None:
            raise ExportError("base_model: a live model already has its base. Leave base_model out.")
        name = choose_adapter(adapter, adapter_name)
        inner = inner_model(adapter)
        base = getattr(adapter_config(adapter, name), "base_model_name_or_path", None)
        resized = resized_embeddings(inner, base or getattr(inner, "name_or_path", None))
        return Source(adapter, name, resized | fully_trained(adapter, name))
    if adapter_name is not None:
        raise ExportError(f"adapter_name={adapter_name!r}: a folder holds only one adapter. Leave adapter_name out.")
    folder = read_adapter_folder(adapter).require("SPECTUNE")
    model, base = (
        (_copied_base(base_model), None) if isinstance(base_model, nn.Module) else _loaded_base(folder, base_model)
    )
    _load(model, folder)
    carried = {name: folder.tensor(name) for name in carried_keys(folder)}
    return Source(model, ADAPTER_NAME, carried, base)


def open_adapted(adapter: str | Path, base: str | Path | None = None) -> tuple[nn.Module, Base]:
    """Get a base model with a saved adapter on it, spectral or LoRA, and that base; errors as `open_source`."""
    folder = read_adapter_folder(adapter).require("SPECTUNE", "LORA")
    model, found = _loaded_base(folder, base)
    _load(model, folder)
    return model, found


def open_base(adapter: str | Path, base: str | Path | None = None) -> tuple[nn.Module, Base]:
    """Get the base model of a saved adapter, without the adapter; errors as `open_source`."""
    return _loaded_base(read_adapter_folder(adapter).require("SPECTUNE", "LORA"), base)


def _copied_base(model: nn.Module) -> nn.Module:
    if getattr(model, "peft_config", None) or not hasattr(model, "load_adapter"):
        found = "adapters already" if getattr(model, "peft_config", None) else "no load_adapter"
        raise ExportError(
            f"base_model: a plain transformers model is needed, but this {type(model).__name__} has {found}. "
            f"Load the adapter onto the model and pass that model instead of the folder."
        )
    return copy.deepcopy(model)


def _loaded_base(folder: AdapterFolder, said: str | Path | None) -> tuple[nn.Module, Base]:
    loader = model_class(folder)
    base = find_base(said, folder)
    try:
        return _live(loader, base, config_options(folder), carried_keys(folder)), base
    except SpectuneError:
        raise
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder.path}: the base {base.name} cannot be loaded: {one_line(error)}. Pass another with --base."
        ) from error


def _live(loader: Any, base: Base, options: dict[str, Any], carried: Sequence[str]) -> nn.Module:
    """Get a model out of what `find_base` found: a folder as transformers saves it, a GGUF file, or any one file.

    A base may have a head of other classes where the adapter's file has its own (`carried`).
    """
    if base.gguf is not None:
        model, info = load_auto(loader, base.gguf.parent, gguf_file=base.gguf.name, **TELL_MISFITS, **options)
    elif base.path.is_dir() and any((base.path / name).exists() for name in OF_TRANSFORMERS):
        model, info = load_auto(loader, base.path, use_safetensors=True, **TELL_MISFITS, **options)
    else:
        if not (base.config_folder / "config.json").is_file():
            raise ValueError(f"{base.config_folder} has no config.json, which says what model this is")
        config = load_auto(transformers.AutoConfig, base.config_folder, **options)
        tensors = dict(base.checkpoint)
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        if not issubclass(loader, transformers.PreTrainedModel):  # an Auto class, which takes no tensors
            with torch.device("meta"):
                loader = type(loader.from_config(config, trust_remote_code=False))
        model, info = loader.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, trust_remote_code=False, **TELL_MISFITS
        )
    replaced(info, lambda name: any(key.endswith(f".{name}") for key in carried))
    loaded: nn.Module = model
    return loaded


def _load(model: nn.Module, folder: AdapterFolder) -> None:
    from ..tuner import SpectralConfig, bounded_config  # here, because it imports PEFT

    resize_for(folder, model)
    experts = sum(len(parameter) for parameter in model.parameters() if parameter.ndim == 3)
    folder.refuse_surplus(sum(1 for _ in model.modules()) + experts, type(model).__name__)
    try:
        # Read here, so that the config knows its folder: transformers passes on the config alone. A spectral one is
        # bounded where it is injected, whoever reads it.
        spectral = folder.peft_type == "SPECTUNE"
        config: Any = (
            SpectralConfig.from_pretrained(str(folder.path)) if spectral else bounded_config(folder.path, model)
        )
        model.load_adapter(str(folder.path), adapter_name=ADAPTER_NAME, peft_config=config)  # type: ignore[operator]
    except SpectuneError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise AdapterError(
            f"{folder.path}: the adapter does not fit {type(model).__name__}: {one_line(error)}. Check base_model."
        ) from error
    layers = tensors_by_layer(folder)
    left = {name for names in layers.values() for name in names.values()}
    for path, name, module in spectral_modules(model):
        if name == ADAPTER_NAME:
            left -= _load_unrounded(module, folder, layers.get(base_path(model, path), {}))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise AdapterError(
            f"{folder.path}: {type(model).__name__} has no place for the tensor {min(left)!r}{more}. Check base_model."
        )


def _load_unrounded(module: SpectralModule, folder: AdapterFolder, names: dict[str, str]) -> set[str]:
    """Put the tensors of one layer (name -> key in the file) into its module as they are; get the keys.

    transformers has loaded them already, but rounds them where the base is in half precision.
    """
    part = {name: folder.tensor(key).to(module.S_R.device) for name, key in names.items()}
    module.embed_basis("U_OR" in part)
    try:
        module.load_state_dict(part, assign=True)
    except RuntimeError as error:
        raise AdapterError(
            f"{module.name}: the adapter file does not fit this layer: {one_line(error)}. Check base_model."
        ) from error
    return set(names.values())

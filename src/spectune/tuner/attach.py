"""The functions with which recipes and commands use PEFT: attach, load, swap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter import ADAPTERS_ATTRIBUTE, SpectralModule, spectral_modules
from ..checkpoint import PEFT_PREFIX, read_adapter_folder
from ..errors import AdapterError, nearest
from .config import SpectralConfig
from .foreign_file import bounded_config
from .layer import SpectralLayer


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Get the model with a new adapter of any PEFT method; its weights are frozen, and the adapter trains."""
    return get_peft_model(model, config)


def load_attached(
    model: nn.Module, folder: str | Path, is_trainable: bool = False, basis: str | None = None
) -> PeftModel:
    """Get the model with a saved adapter of any PEFT method; its config may be a stranger's, and is checked first.

    `basis` is the file with the directions that a spectral adapter shares, unless it is beside the adapter.
    """
    config = bounded_config(folder, model)
    if isinstance(config, SpectralConfig):
        own = None if basis is None else SpectralConfig.from_pretrained(str(folder), basis=basis)
        return PeftModel.from_pretrained(model, str(folder), config=own, is_trainable=is_trainable)
    return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)


def load_beside(model: Any, folder: str | Path, adapter_name: str) -> None:
    """Add a saved adapter to a model that already has one, in place, under another name."""
    config = bounded_config(folder, model.get_base_model())
    if isinstance(config, SpectralConfig):
        model.load_adapter(str(folder), adapter_name=adapter_name)
        return
    config.inference_mode = True
    model.add_adapter(adapter_name, config)
    saved = read_adapter_folder(folder)
    set_peft_model_state_dict(model, {name: saved.tensor(name) for name in saved.names}, adapter_name)


def swap_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Replace the numbers of a live adapter by those of a saved one, in place.

    Trained tensors keep their identity, so a compiled model need not be compiled again. The saved adapter must have
    the same method, options and targets, and be of this base; `AdapterError` otherwise, and nothing is changed. No
    singular value decomposition is done: the bases in the model are rotated to match the saved sketches.
    """
    saved = read_adapter_folder(folder).require("SPECTUNE")
    if adapter_name not in model.peft_config:
        known = list(model.peft_config)
        raise AdapterError(f"{folder}: the model has no adapter {adapter_name!r}. {nearest(adapter_name, known)}")
    present = model.peft_config[adapter_name]
    incoming = SpectralConfig.from_pretrained(str(folder))
    mine, theirs = ((config.build_method(), config.bias) for config in (present, incoming))
    if mine != theirs:
        raise AdapterError(
            f"{folder}: cannot swap this adapter in: it is {theirs[0]}, biases {theirs[1]!r}, but the model has "
            f"{mine[0]}, {mine[1]!r}. Load it as another adapter."
        )
    if any(isinstance(layer, SpectralLayer) and adapter_name in layer.merged_adapters for layer in model.modules()):
        raise AdapterError(f"{folder}: cannot swap into adapter {adapter_name!r} while it is merged. Unmerge it first.")
    tensors = {name.removeprefix(PEFT_PREFIX): saved.tensor(name) for name in saved.names}
    parameters = {name.removeprefix(PEFT_PREFIX): parameter for name, parameter in model.named_parameters()}
    written = _tensors_of(model, adapter_name)
    if present.bias != "none":
        written |= {name: parameters[name] for name in tensors if name.endswith(".bias") and name in parameters}
    _refuse_others(folder, adapter_name, written, tensors, parameters)
    modules = [module for _, name, module in spectral_modules(model) if name == adapter_name]
    rest = [tensor for name, tensor in written.items() if f".{ADAPTERS_ATTRIBUTE}." not in name]
    with _put_back_on_error(modules, rest):
        brought = {name: tensors[plain] for name in saved.names if (plain := name.removeprefix(PEFT_PREFIX)) in written}
        set_peft_model_state_dict(model, brought, adapter_name)
        for module in modules:
            module.refuse_non_finite()  # what was finite in the file may be too large for the live dtype


def _tensors_of(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Get name in a file -> live tensor, for the tensors that a file of this adapter always contains."""
    found = {
        f"{layer.removeprefix(PEFT_PREFIX)}.{ADAPTERS_ATTRIBUTE}.{tensor}": value
        for layer, name, module in spectral_modules(model)
        if name == adapter_name
        for tensor, value in module.state_dict().items()
    }
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            state, places = wrapper.state_dict(), wrapper.adapter_state_dict_load_map(adapter_name)
            found |= {f"{path.removeprefix(PEFT_PREFIX)}.{key}": state[place] for key, place in places.items()}
    return found


def _refuse_others(
    folder: str | Path,
    adapter_name: str,
    mine: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    parameters: dict[str, torch.Tensor],
) -> None:
    """Raise `AdapterError` if a file has other tensors than the live adapter; the base's own do not count."""

    def differs(name: str) -> bool:
        if name not in theirs:
            return True
        brought, present = theirs[name], mine.get(name, parameters.get(name))
        if present is None or present.shape != brought.shape:
            return True
        if name not in mine:  # PEFT saves an embedding that is adapted
            return not torch.equal(present, brought.to(present))
        return present.is_floating_point() != brought.is_floating_point()

    different = sorted(filter(differs, mine.keys() | theirs.keys()))
    if different:
        raise AdapterError(
            f"{folder}: cannot swap into adapter {adapter_name!r}: {len(different)} tensors differ, first "
            f"{different[0]!r}. Load it as another adapter."
        )


@contextmanager
def _put_back_on_error(modules: list[SpectralModule], rest: list[torch.Tensor]) -> Iterator[None]:
    """Restore modules and tensors if the block raises anything."""
    held = [module.hold() for module in modules]
    copies = [tensor.detach().clone() for tensor in rest]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for put_back in held:
                put_back()
            for tensor, copy in zip(rest, copies, strict=True):
                tensor.copy_(copy)
        raise

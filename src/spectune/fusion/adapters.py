"""Saved adapters in the form that the rules read: one `Part` for every adapter and layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapter import Owners, SpectralModule, saved_modules
from ..adapter.saved import (
    LayerRanks,
    base_tensor,
    fill_module,
    owner_first,
    refuse_misfits,
    saved_method,
    saved_svd,
    tensors_by_layer,
)
from ..checkpoint import (
    AdapterFolder,
    Base,
    Checkpoint,
    LoraFile,
    base_at_hand,
    find_base,
    read_adapter_folder,
    read_lora,
)
from ..errors import AdapterError, SpectuneError
from ..records import Spectrum
from ..spectrum.columns import choose
from .contract import Part, Stored

MIDDLE = ".spectune_adapter."


@dataclass(frozen=True, eq=False)
class Adapter:
    """One saved adapter: spectral, or PEFT's LoRA."""

    name: str
    folder: AdapterFolder = field(repr=False)
    lora: LoraFile | None = field(repr=False)

    @property
    def base_name(self) -> str | None:
        """What its config calls its base model."""
        return self.folder.base_name or None

    @property
    def revision(self) -> str:
        """Which revision of its base it was trained on; that of a repository that nobody chose is main."""
        return str(self.folder.config.get("revision") or "main")

    @property
    def base_label(self) -> str:
        """Its base as an error shows it."""
        return f"{self.base_name}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def carried(self) -> dict[str, torch.Tensor]:
        """Tensors outside the updates: modules and biases trained in full."""
        if self.lora is not None:
            return {name: self.folder.tensor(name) for name in self.lora.carried}
        return {name: self.folder.tensor(name) for name in self.folder.names if MIDDLE not in name}

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers."""
        return list(tensors_by_layer(self.folder) if self.lora is None else self.lora.layers)

    def needs_base(self) -> str | None:
        """Get a layer whose singular directions are not in the file, or None."""
        if self.lora is not None:
            return None
        layers = tensors_by_layer(self.folder)
        return next((layer for layer, names in layers.items() if "U_OR" not in names), None)

    def parts(self, base: Checkpoint | None) -> Mapping[str, Part]:
        """Get layer -> its update, computed on the base and checked against it if the base is given."""
        try:
            if self.lora is not None:
                return _LoraParts(self.name, self.folder, self.lora, base)
            return {part.layer: part for part in self._spectral_parts(base)}
        except SpectuneError as error:
            raise AdapterError(f"{self.folder.path}: {error}") from error

    def _spectral_parts(self, base: Checkpoint | None) -> Iterator[Part]:
        if base is None:
            for layer, module in self._embedded_modules():
                yield self._part(layer, module, Stored())
            return
        for layer, tensor_name, transposed, module in saved_modules(self.folder, base):
            yield self._part(layer, module, Stored(transposed, base.shapes[tensor_name][2:]))

    def _part(self, layer: str, module: SpectralModule, stored: Stored) -> Part:
        module.settle()
        module.double()
        columns, found = _columns(module, self.folder.config), module.spectrum
        basis = None
        if columns:
            basis = Spectrum(found.U_OR, found.S_R, found.Vh_RI, columns, found.quality, layer)
        trained = {name: tensor.detach() for name, tensor in module.trained.items()}
        with torch.no_grad():
            return Part(self.name, layer, module.delta(), module.method, basis, trained, stored=stored)

    def _embedded_modules(self) -> Iterator[tuple[str, SpectralModule]]:
        """Get the modules of a file that contains its bases, from the file alone."""
        owners = Owners()
        ranks = LayerRanks.of_config(self.folder.config)
        for layer, names in owner_first(self.folder):
            tensors = {name: self.folder.tensor(key) for name, key in names.items()}
            if any(tensors.get(name, torch.zeros(0)).ndim != 2 for name in ("U_OR", "Vh_RI")):
                raise AdapterError(
                    f"{layer}: the adapter file is incomplete: it lacks part of this layer's basis. Copy it again."
                )
            shape = tensors["U_OR"].shape[0], tensors["Vh_RI"].shape[1]
            method = saved_method(self.folder.config, layer, ranks, shape)
            owner = owners.of(method, layer, *shape)
            refuse_misfits(method, layer, shape, tensors, owner)
            module = SpectralModule(
                method, Spectrum.unknown(*shape, method.basis(*shape)[0], layer), embed_basis=True, owner=owner
            )
            owners.add(module)
            fill_module(module, tensors)
            yield layer, module


class _LoraParts(Mapping[str, Part]):
    """Layer -> the update of a LoRA, read from its file when it is asked for."""

    def __init__(self, name: str, folder: AdapterFolder, lora: LoraFile, base: Checkpoint | None) -> None:
        self.name, self.lora = name, lora
        self.transposed = bool(folder.config.get("fan_in_fan_out"))
        for layer, place in lora.layers.items():
            if "lora_embedding" in place.A_name:
                raise AdapterError(f"{layer}: a LoRA of an embedding cannot be fused. Train without it, or merge it.")
            if base is not None:
                rows_O, cols_I = lora.file.shapes[place.B_name][0], math.prod(lora.file.shapes[place.A_name][1:])
                _refuse_other_shape(layer, (rows_O, cols_I), base)

    def __getitem__(self, layer: str) -> Part:
        kernel = self.lora.file.shapes[self.lora.layers[layer].A_name][2:]
        delta = self.lora.delta(layer, torch.float64)
        return Part(self.name, layer, delta, stored=Stored(self.transposed, kernel))

    def __contains__(self, layer: object) -> bool:
        return layer in self.lora.layers  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.lora.layers)

    def __len__(self) -> int:
        return len(self.lora.layers)


def _refuse_other_shape(layer: str, shape: tuple[int, int], base: Checkpoint) -> None:
    """Raise `AdapterError` if a LoRA's layer has another shape in the base; nothing else can be checked."""
    rows, *rest = base.shapes[base_tensor(layer, base)]
    if sorted(shape) != sorted((rows, math.prod(rest))):
        raise AdapterError(
            f"{layer}: the update is {shape[0]}x{shape[1]}, but the base weight is {rows}x{math.prod(rest)}. Pass the "
            "base it was trained on."
        )


def _columns(module: SpectralModule, config: dict[str, Any]) -> tuple[int, ...]:
    """Get the singular columns of a module from its config; an embedded basis does not store them."""
    chosen = getattr(module.method, "columns", None)
    if chosen is None:
        return ()
    rows_O, cols_I, seed = module.U_OR.shape[0], module.Vh_RI.shape[1], saved_svd(config).get("seed", 0)
    try:
        return choose(chosen, module.U_OR.shape[1], min(rows_O, cols_I), seed).places
    except SpectuneError as error:
        raise AdapterError(f"{module.name}: {str(error).replace('{shape}', f'{rows_O}x{cols_I}')}") from error


def open_adapters(paths: Sequence[str | Path]) -> list[Adapter]:
    """Get saved adapters, each named after its folder (or run), or by its path where two are alike."""
    folders = [read_adapter_folder(path).require("SPECTUNE", "LORA") for path in paths]
    names = [Path(path).resolve().name for path in paths]
    return [
        Adapter(
            name if names.count(name) == 1 else str(path),
            folder,
            read_lora(folder.path) if folder.peft_type == "LORA" else None,
        )
        for path, name, folder in zip(paths, names, folders, strict=True)
    ]


def common_base(adapters: Sequence[Adapter], base: str | Path | None) -> Base | None:
    """Get the base: the one given, else the one that the adapters name, which is downloaded only if it is needed.

    `AdapterError` where adapters name different bases and none is given to settle it, or where a file keeps only a
    sketch of its directions and there is no base to find them on. None where nothing is at hand and nothing needed.
    """
    if base is not None:
        return find_base(base, adapters[0].folder)
    named: dict[tuple[str, str], Adapter] = {}
    for adapter in adapters:
        if adapter.base_name is not None:
            named.setdefault((_one_place(adapter.base_name), adapter.revision), adapter)
    if len(named) > 1:
        first, second = [*named.values()][:2]
        raise AdapterError(
            f"{second.name} was trained on the base {second.base_label!r} and {first.name} on {first.base_label!r}, "
            f"and updates of different bases cannot be fused. If they are copies of one model, pass --base to have "
            f"that checked."
        )
    owner = next(iter(named.values()), None)
    for adapter in adapters:
        if layer := adapter.needs_base():
            return _needed_base(adapter, layer, owner)
    return None if owner is None else base_at_hand(owner.folder)


def _needed_base(adapter: Adapter, layer: str, owner: Adapter | None) -> Base:
    """Get the base that the adapters name, for the directions of a layer that its file does not have."""
    try:
        return find_base(None, (owner or adapter).folder)
    except AdapterError as error:
        raise AdapterError(f"{error} The directions of {layer} are not in the file, they are found on the base.") from (
            error
        )


def _one_place(name: str) -> str:
    """Get one spelling for a folder; a hub name stays as it is."""
    return os.path.realpath(name) if os.path.exists(name) else name

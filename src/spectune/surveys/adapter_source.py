"""`open_adapter`: the updates of a saved adapter, spectral or LoRA, one layer at a time, each with its base weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter import BASIS, base_tensor, saved_modules
from ..adapter.base_names import by_live_names
from ..adapter.saved import tensors_by_layer
from ..checkpoint import (
    CONFIG_FILE,
    AdapterFolder,
    Base,
    Checkpoint,
    LoraFile,
    TensorFile,
    adapter_path,
    base_at_hand,
    find_base,
    read_adapter_folder,
    read_lora,
    trained_in,
)
from ..errors import AdapterError
from ..records import Delta

# Parts of tensor names in files of adapters, whoever wrote them.
ADAPTER_NAMES = re.compile(r"lora_|\.lora\.|hada_|lokr_|spectune_adapter")
# kohya's prefixes of layer names, in which dots are underscores.
KOHYA_PREFIX = re.compile(r"^lora_(unet|te\d?|transformer|prior_unet)_")


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """One layer's update, and its base weight if a base is given."""

    name: str
    delta: Delta
    W_OI: torch.Tensor | None


@dataclass(frozen=True)
class AdapterSource:
    """A saved adapter, and how to read its updates."""

    path: Path
    method: str
    layer_count: int
    trainable: int
    file_bytes: int
    base: Base | None
    lora: LoraFile | None

    def updates(self) -> Iterator[LayerUpdate]:
        """Read the updates, one layer at a time; spectral ones are checked against the base."""
        if self.lora is None:
            assert self.base is not None
            for layer, tensor, transposed, module in saved_modules(
                read_adapter_folder(self.path), self.base.checkpoint
            ):
                stored = self.base.checkpoint.tensor(tensor)
                yield LayerUpdate(layer, module.delta(), (stored.T if transposed else stored.flatten(1)).float())
            return
        for layer in self.lora.layers:
            delta = self.lora.delta(layer)
            W_OI = None if self.base is None else _base_matrix(self.lora, layer, delta, self.base.checkpoint)
            yield LayerUpdate(layer, delta, W_OI)


def is_adapter(path: str | Path) -> bool:
    """Ask whether a folder, a file or a run is an adapter and not a model: by its config, or by the names inside."""
    if (trained_in(path) / CONFIG_FILE).exists():
        return True
    return any(ADAPTER_NAMES.search(name) for name in find_base(path).checkpoint.files)


def open_adapter(path: str | Path, base: str | Path | None = None) -> AdapterSource:
    """Get a saved adapter: a PEFT folder (spectral or LoRA), a run's folder, or a LoRA file of diffusers or kohya.

    The base is the one given, else the one that the adapter's config names (`find_base`). A LoRA does not need one, and
    nothing is downloaded for it unless `base` is given; a spectral adapter needs its base. Only headers are read.
    """
    path = adapter_path(path)
    folder = read_adapter_folder(path) if path.is_dir() and (path / CONFIG_FILE).exists() else None
    if folder is None or folder.peft_type == "LORA":
        lora = read_lora(path)
        size, found = lora.file.path.stat().st_size, _lora_base(folder, base)
        if folder is not None and found is not None:
            folder.refuse_surplus(found.checkpoint.parts, found.name)
            found = replace(found, checkpoint=by_live_names(found.checkpoint, lora.layers))
        return AdapterSource(path, "lora", len(lora.layers), lora.trained_count, size, found, lora)
    folder.require("SPECTUNE", "LORA")
    method = str(folder.config.get("method"))
    known = find_base(base, folder)
    folder.refuse_surplus(known.checkpoint.parts, known.name)
    experts = folder.config.get("target_parameters")
    known = replace(known, checkpoint=by_live_names(known.checkpoint, tensors_by_layer(folder), experts))
    return AdapterSource(path, method, *_spectral_size(folder.file), known, None)


def _lora_base(folder: AdapterFolder | None, base: str | Path | None) -> Base | None:
    if base is not None:
        return find_base(base, folder)
    return None if folder is None else base_at_hand(folder)


def _spectral_size(file: TensorFile) -> tuple[int, int, int]:
    """Get (layers, trained numbers, bytes): all tensors but basis, sketch and places (integers) are trained."""
    kept = {*BASIS, "sketch"}
    layers, numbers = set(), 0
    for key, shape in file.shapes.items():
        layer, middle, name = key.rpartition(".spectune_adapter.")
        if middle:
            layers.add(layer)
            trained = name not in kept and file.dtypes[key].is_floating_point
            numbers += int(torch.Size(shape).numel()) if trained else 0
    return len(layers), numbers, file.path.stat().st_size


def _base_matrix(lora: LoraFile, layer: str, delta: Delta, base: Checkpoint) -> torch.Tensor:
    """Read W_OI of a LoRA's layer. Square weights are taken as stored unless the config says fan_in_fan_out."""
    stored = base.tensor(_base_name(layer, base))
    W_OI = stored.flatten(1).float()
    if tuple(W_OI.shape) == delta.shape and not (lora.config.get("fan_in_fan_out") and stored.ndim == 2):
        return W_OI
    if tuple(W_OI.T.shape) == delta.shape:
        return W_OI.T
    found, asked = ("x".join(map(str, shape)) for shape in (W_OI.shape, delta.shape))
    raise AdapterError(
        f"{layer}: the update is {asked}, but the base weight is {found}. Pass the base it was trained on."
    )


def _base_name(layer: str, base: Checkpoint) -> str:
    """Get the base's tensor of a layer; kohya's names are compared with dots as underscores."""
    if not KOHYA_PREFIX.match(layer):
        return base_tensor(layer, base)
    wanted = KOHYA_PREFIX.sub("", layer)
    found = [name for name in base.names if name.removesuffix(".weight").replace(".", "_") == wanted]
    found = [name for name in found if name.endswith(".weight")]
    if len(found) != 1:
        raise AdapterError(
            f"{base.path}: the base has no tensor for the layer {layer!r}. Pass the part of the pipeline that it "
            "belongs to."
        )
    return found[0]

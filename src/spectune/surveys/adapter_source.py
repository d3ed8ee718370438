"""`open_adapter`: the updates of a saved adapter, spectral or LoRA, one layer at a time, each with its base weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter import base_tensor, saved_modules
from ..checkpoint import Checkpoint, LoraFile, TensorFile, open_checkpoint, read_adapter_folder, read_lora
from ..errors import AdapterError
from ..records import Delta

CONFIG_FILE = "adapter_config.json"
# What the names of tensors hold in files of adapters, whoever wrote them.
ADAPTER_NAMES = re.compile(r"lora_|\.lora\.|hada_|lokr_|spectune_adapter")
# How kohya's trainer begins the names of layers, whose dots it turns into underscores.
KOHYA_PREFIX = re.compile(r"^lora_(unet|te\d?|transformer|prior_unet)_")


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """One layer's update, and its base weight if a base is given."""

    name: str
    delta: Delta
    W_OI: torch.Tensor | None


@dataclass(frozen=True)
class AdapterSource:
    """A saved adapter: what it is, and how to read it."""

    path: Path
    method: str
    layer_count: int
    trainable: int
    file_bytes: int
    base: Checkpoint | None
    lora: LoraFile | None

    def updates(self) -> Iterator[LayerUpdate]:
        """Read the updates, one layer at a time; spectral ones are checked against the base."""
        if self.lora is None:
            assert self.base is not None
            for layer, tensor, transposed, module in saved_modules(read_adapter_folder(self.path), self.base):
                stored = self.base.tensor(tensor)
                yield LayerUpdate(layer, module.delta(), (stored.T if transposed else stored.flatten(1)).float())
            return
        for layer in self.lora.layers:
            delta = self.lora.delta(layer)
            yield LayerUpdate(
                layer, delta, None if self.base is None else _base_matrix(self.lora, layer, delta, self.base)
            )


def is_adapter(path: str | Path) -> bool:
    """Ask whether a folder or file is an adapter, not a model: by its config, or by the names in its header."""
    path = Path(path)
    if path.is_dir() and (path / CONFIG_FILE).exists():
        return True
    return any(ADAPTER_NAMES.search(name) for name in open_checkpoint(path).files)


def open_adapter(path: str | Path, base: str | Path | None = None) -> AdapterSource:
    """Get a saved adapter: a PEFT folder (spectral or LoRA), or a LoRA file of diffusers or kohya's trainer.

    The base is the folder given, or else the one that the adapter's config names, if it is a local folder. A LoRA can
    do without; for a spectral adapter a missing base is an `AdapterError`. Only headers are read.
    """
    path = _folder_of(Path(path))
    folder = read_adapter_folder(path) if path.is_dir() and (path / CONFIG_FILE).exists() else None
    named = "" if folder is None else str(folder.config.get("base_model_name_or_path") or "")
    place = base if base is not None else (named if named and Path(named).is_dir() else None)
    weights = None if place is None else open_checkpoint(place)
    if folder is None or folder.peft_type == "LORA":
        lora = read_lora(path)
        return AdapterSource(
            path, "lora", len(lora.layers), lora.trained_count, lora.file.path.stat().st_size, weights, lora
        )
    folder.require("SPECTUNE", "LORA")
    if weights is None:
        missing = f"and {named!r} is not a folder here" if named else "which its config does not name"
        raise AdapterError(
            f"{path}: a spectral adapter can only be read with its base model, {missing}. Pass --base FOLDER."
        )
    return AdapterSource(path, str(folder.config.get("method")), *_spectral_size(folder.file), weights, None)


def _folder_of(path: Path) -> Path:
    """Get PEFT's folder for the tensor file inside it; any other path unchanged."""
    return path.parent if path.is_file() and (path.parent / CONFIG_FILE).exists() else path


def _spectral_size(file: TensorFile) -> tuple[int, int, int]:
    """Get (layers, trained numbers, bytes): everything except basis, sketch and pattern was trained."""
    kept = {"U_OR", "S_R", "Vh_RI", "sketch", "rows", "cols"}
    layers, numbers = set(), 0
    for key, shape in file.shapes.items():
        layer, middle, name = key.rpartition(".spectune_adapter.")
        if middle:
            layers.add(layer)
            numbers += 0 if name in kept else int(torch.Size(shape).numel())
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

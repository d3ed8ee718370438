"""`read_lora`: the updates in a plain LoRA file, whoever wrote it, as `Delta`s read one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, nearest
from ..records import Delta
from .adapter_folder import CONFIG_FILE, PEFT_PREFIX, adapter_path, read_adapter_folder
from .patterns import Clock, LayerPatterns
from .tensor_file import TensorFile

# Endings of the factors' names in PEFT, diffusers (new and old) and kohya's trainer: A first, then B.
ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
# Tensors and options with which an update is not B A, and why.
FOREIGN = {
    "lora_magnitude_vector": "DoRA rescales the merged weight, so its update is not B A",
    "dora_scale": "DoRA rescales the merged weight, so its update is not B A",
    "lora_B.bias": "it has a bias besides B A",
    "hada_": "LoHa's update is a product of entries and not B A",
    "lokr_": "LoKr's update is a Kronecker product and not B A",
    "lora_mid": "its kernels are a Tucker product of three factors and not B A",
}
# PEFT's initialisations that move part of the base weight into the factors, so that they are not the update.
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The limit of float32, in which updates are computed.
LARGEST_ALPHA = torch.finfo(torch.float32).max
# diffusers' key for PEFT's options in a file's header, each with its part's name in front: unet.lora_alpha.
DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraLayer:
    """The names of one layer's factors in the file: dW = scaling B_OP A_PI."""

    name: str
    """The layer's path in the base model, as the file gives it, without PEFT's prefix."""
    A_name: str
    B_name: str
    rank: int
    scaling: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: its layers by name; the tensors stay on the disk."""

    path: Path
    file: TensorFile = field(repr=False)
    layers: dict[str, LoraLayer] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    """PEFT's adapter_config.json; empty for other files."""

    @property
    def trained_count(self) -> int:
        """The count of numbers in the factors."""
        used = (name for layer in self.layers.values() for name in (layer.A_name, layer.B_name))
        return sum(math.prod(self.file.shapes[name]) for name in used)

    @property
    def carried(self) -> tuple[str, ...]:
        """Tensors that belong to no update: modules trained in full (modules_to_save)."""
        used = {name for layer in self.layers.values() for name in (layer.A_name, layer.B_name)}
        return tuple(name for name in self.file.names if name not in used and not name.endswith(".alpha"))

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (B_OP, A_PI) as stored, without the scaling; the kernels of a convolution are flattened."""
        if layer not in self.layers:
            raise AdapterError(f"{self.path}: the layer {layer!r} does not exist. {nearest(layer, list(self.layers))}")
        place = self.layers[layer]
        return self.file.tensor(place.B_name).flatten(1), self.file.tensor(place.A_name).flatten(1)

    def delta(self, layer: str, dtype: torch.dtype = torch.float32) -> Delta:
        """Get the layer's update dW_OI = B_OP diag(scaling) A_PI."""
        B_OP, A_PI = self.factors(layer)
        scaling_P = torch.full((A_PI.shape[0],), self.layers[layer].scaling, dtype=dtype)
        return Delta(B_OP.to(dtype), scaling_P, A_PI.to(dtype))


def read_lora(path: str | Path) -> LoraFile:
    """Get a LoRA from PEFT's folder, or from a safetensors file of diffusers or kohya's trainer.

    Only headers (and the scalars named alpha) are read. scaling = alpha / r, or alpha / sqrt(r) with rsLoRA, by
    PEFT's alpha_pattern if there is one (also from diffusers' header); 1 for a file that has no alpha and is not
    PEFT's. `AdapterError` for a path that is not a LoRA, for DoRA, LoHa, LoKr, trained biases and target_parameters,
    and for PiSSA-like files that also change the base weight.
    """
    path = adapter_path(path)  # PEFT's config beside the file has the scaling
    config: dict[str, Any] = {}
    if os.path.isdir(path) and (path / CONFIG_FILE).exists():
        folder = read_adapter_folder(path).require("LORA")
        file, config = folder.file, folder.config
        _refuse_moved_base(path, config)
    else:
        file = TensorFile.open(_only_lora(path))
    _refuse_foreign(path, file, config)
    options = _checked(path, {"": config} if config else _diffusers_options(path, file))
    layers: dict[str, LoraLayer] = {}
    for name in file.names:
        for A_end, B_end in ENDINGS:
            if name.endswith(A_end):
                stem = name.removesuffix(A_end)
                layer = _layer(path, file, options, stem, name, stem + B_end)
                if layer.name in layers:
                    raise AdapterError(f"{path}: the layer {layer.name!r} has two pairs of factors. Copy it again.")
                layers[layer.name] = layer
    if not layers:
        raise AdapterError(f"{path}: this is not a LoRA: {file.path.name} contains no pair of factors. Check the path.")
    return LoraFile(path, file, layers, config)


def _only_lora(path: Path) -> Path:
    if not os.path.isdir(path):
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise AdapterError(
            f"{path}: a LoRA is needed, but this folder contains {len(found)} safetensors files. Name one file."
        )
    return found[0]


def _diffusers_options(path: Path, file: TensorFile) -> dict[str, dict[str, Any]]:
    """Get part of the pipeline -> PEFT's options for it, from the header of a diffusers file."""
    parts: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(file.metadata.get(DIFFUSERS_METADATA, "{}")).items():
            part, option = key.split(".", 1)
            parts.setdefault(part + ".", {})[option] = value
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: {DIFFUSERS_METADATA} in its header is damaged. Copy it again.") from error
    return parts


@dataclass(frozen=True)
class _Options:
    """PEFT's options for one part of the pipeline, and the patterns of its alpha_pattern."""

    config: Mapping[str, Any]
    patterns: LayerPatterns


def _checked(path: Path, options: Mapping[str, Mapping[str, Any]]) -> dict[str, _Options]:
    """Get the options with their patterns parsed, all on one clock."""
    clock, checked = Clock(), {}
    for part, config in options.items():
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterError(
                f"{path}: alpha_pattern={patterns!r} is not a map from layers to alphas. Repair the config."
            )
        checked[part] = _Options(config, LayerPatterns(patterns, clock))
    return checked


def _layer(path: Path, file: TensorFile, options: Mapping[str, _Options], stem: str, A: str, B: str) -> LoraLayer:
    if B not in file.shapes:
        raise AdapterError(f"{path}: the factor {A!r} lacks its partner {B!r}: the file is incomplete. Copy it again.")
    (rank, *_), B_shape = file.shapes[A] or (0,), file.shapes[B]
    fits = len(file.shapes[A]) >= 2 and len(B_shape) >= 2 and rank > 0 and B_shape[1] == rank
    if not fits or any(side != 1 for side in B_shape[2:]):
        raise AdapterError(
            f"{path}: the shapes of {A!r} {file.shapes[A]} and {B!r} {B_shape} do not fit together as B A. "
            "Copy the file again."
        )
    name = stem.removeprefix(PEFT_PREFIX)
    if f"{stem}.alpha" in file.shapes:
        alpha = file.tensor(f"{stem}.alpha")
        scaling = _number(path, name, alpha.item() if alpha.numel() == 1 else None) / rank
    else:
        part = next((part for part in options if name.startswith(part)), None)
        if part is None and stem.startswith(PEFT_PREFIX):
            raise AdapterError(
                f"{path}: {name!r} is a name of PEFT, which keeps the scaling in {CONFIG_FILE}, but there is no such "
                f"file here. Pass PEFT's folder."
            )
        scaling = 1.0 if part is None else _peft_scaling(path, options[part], name.removeprefix(part), rank)
    return LoraLayer(name, A, B, rank, scaling)


def _peft_scaling(path: Path, options: _Options, layer: str, rank: int) -> float:
    pattern = options.patterns.first(layer)
    alpha = options.config.get("lora_alpha", 8) if pattern is None else options.config["alpha_pattern"][pattern]
    alpha = _number(path, layer, alpha)  # 8 is PEFT's default
    return alpha / (rank**0.5 if options.config.get("use_rslora") else rank)


def _number(path: Path, layer: str, alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_ALPHA:
        raise AdapterError(f"{path}: the alpha of {layer!r} must be a finite number, not {alpha!r}. Copy it again.")
    return float(alpha)


def _refuse_foreign(path: Path, file: TensorFile, config: Mapping[str, Any]) -> None:
    for name in file.names:
        for part, reason in FOREIGN.items():
            if part in name:
                raise AdapterError(f"{path}: {name!r} shows that this is not a plain LoRA: {reason}. Merge it instead.")
    if config.get("target_parameters"):
        raise AdapterError(
            f"{path}: target_parameters={config['target_parameters']!r}: factors of stacked parameters (experts) are "
            f"not B A of one weight. Merge it instead."
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={config['bias']!r}: trained biases are not part of B A. Merge it instead.")


def _refuse_moved_base(path: Path, config: Mapping[str, Any]) -> None:
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(MOVED_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights={start!r} moves part of the base weight into the factors, so they are not the "
            f"update. Save it with path_initial_model_for_weight_conversion (PEFT) first."
        )

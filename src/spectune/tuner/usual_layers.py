"""What is tuned without `target_modules` where PEFT's table has no row for the architecture: the attention."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..errors import WeightError
from .base_weight import backend_of, layout_of
from .config import SpectralConfig

# LlamaAttention, WhisperAttention, Attention (diffusers, timm), BertSelfAttention, FalconFlashAttention2; but no
# AttentionBlock, which also holds the layers behind the attention.
ATTENTION = re.compile(r"(Attention|Attn)\d*$")
# From here to the call of get_peft_model: this room's and PEFT's own frames are between them.
ABOVE_PEFT = 7


def choose_usual_layers(config: SpectralConfig, model: nn.Module) -> None:
    """Set `target_modules` of a new config to the projections in the model's attention modules, and say so.

    Nothing is set where the config names its targets, PEFT's table has some, or the model has no attention.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    named = config.target_modules is not None or config.target_parameters or config.origin is not None
    if named or kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return
    if chosen := dict(attention_projections(model)):
        rest = [path for path, _ in model.named_modules() if path and path not in chosen]
        config.target_modules = {_shortest_end(path, rest) for path in chosen}
        warnings.warn(
            f"target_modules: PEFT's table has no usual layers for {kind}, so the "
            f"{len(chosen)} projections of its attention are tuned: {', '.join(sorted(config.target_modules))}.",
            stacklevel=ABOVE_PEFT,
        )


def attention_projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Get path and layer of every linear layer in a module of attention; torch's own attention is one layer."""
    places = tuple(
        f"{path}." for path, module in model.named_modules() if ATTENTION.search(type(_innermost(module)).__name__)
    )
    within = tuple(place for place in places if _is_of_torch(model.get_submodule(place[:-1])))
    for path, module in model.named_modules():
        if ".base_layer" in path or f"{path}.".startswith(within) != _is_of_torch(module):
            continue
        try:
            layer: Any = _innermost(module)
            kind = layout_of(layer, path, backend_of(layer)).kind if f"{path}.".startswith(places) else ""
        except WeightError:  # not a layer with a weight that can be adapted
            continue
        if kind in ("linear", "attention"):
            yield path, layer


def _innermost(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_of_torch(module: nn.Module) -> bool:
    return isinstance(_innermost(module), nn.MultiheadAttention)


def _shortest_end(path: str, rest: list[str]) -> str:
    """Get the last parts of a path, as few as no other path ends in."""
    parts = path.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, 0, -1))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in rest)), path)

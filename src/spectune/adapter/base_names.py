"""Which tensor of a base an adapted layer stands on: `base_tensor`, and `by_live_names` where transformers renames."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.live_names import live_view
from ..checkpoint.model_class import class_named, without_memory
from ..checkpoint.stacks import with_slices
from ..errors import AdapterError, nearest


def base_tensor(layer: str, base: Checkpoint) -> str:
    """Get the name of a layer's weight in the checkpoint, which may lack the leading name of the model's body."""
    wanted = f"{layer}.weight"
    if (name := _found(wanted, base)) is not None:
        return name
    raise AdapterError(
        f"{base.path}: the base has no tensor for the layer {layer!r}. If transformers renames it on load, merge in "
        f"memory (merge_and_unload, save_pretrained). {nearest(wanted, base.names)}"
    )


def _found(wanted: str, base: Checkpoint) -> str | None:
    parts = wanted.split(".")
    for start in range(max(len(parts) - 1, 1)):
        if (name := ".".join(parts[start:])) in base.files:
            return name
    ending = [name for name in base.names if name.endswith("." + wanted)]
    return ending[0] if len(ending) == 1 else None


def by_live_names(base: Checkpoint, layers: Iterable[str], target_parameters: object = None) -> Checkpoint:
    """Get the base under the names of the live model if some of these layers are not found otherwise; else as it is.

    Matrices of the parameters in `target_parameters` (experts) are tensors of their own.
    """
    layers = list(layers)
    whole = with_experts(base, layers, target_parameters)
    try:
        for layer in layers:
            base_tensor(layer, whole)
    except AdapterError:
        kind = class_named(base.path) if base.path.is_dir() else None
        if kind is not None:
            live = live_view(base, without_memory(kind, base.path)).checkpoint
            return with_experts(live, layers, target_parameters)
    return whole


def with_experts(base: Checkpoint, layers: Iterable[str], target_parameters: object) -> Checkpoint:
    """Get the base with the matrices of parameters that are adapted layers (`experts.down_proj.3`) as tensors."""
    named = target_parameters if isinstance(target_parameters, (list, tuple, set)) else ()
    places: dict[str, set[int]] = {}
    for layer in layers:
        path = parameter_of(layer, named)
        if path is not None and (stored := _found(path, base)) is not None:
            places.setdefault(stored, set()).add(int(layer.rpartition(".")[2]))
    return with_slices(base, places) if places else base


def parameter_of(layer: str, target_parameters: Iterable[Any]) -> str | None:
    """Get the path of the parameter that a layer is one matrix of (`mlp.experts.gate_up_proj.3`), or None."""
    path, _, place = layer.rpartition(".")
    named = any(isinstance(word, str) and f".{path}".endswith(f".{word}") for word in target_parameters)
    # A place as the tuner writes it: a second spelling ("07") would be a second layer for one matrix.
    return path if named and re.fullmatch("0|[1-9][0-9]{0,6}", place) else None

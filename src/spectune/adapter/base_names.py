"""Which tensor of a base an adapted layer stands on: `base_tensor`, and `by_live_names` where transformers renames."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint import Checkpoint
from ..checkpoint.live_names import live_view
from ..checkpoint.model_class import class_named, without_memory
from ..errors import AdapterError, nearest


def base_tensor(layer: str, base: Checkpoint) -> str:
    """Get the name of a layer's weight in the checkpoint, which may lack the leading name of the model's body."""
    wanted = f"{layer}.weight"
    parts = wanted.split(".")
    for start in range(len(parts) - 1):
        if (name := ".".join(parts[start:])) in base.files:
            return name
    ending = [name for name in base.names if name.endswith("." + wanted)]
    if len(ending) == 1:
        return ending[0]
    raise AdapterError(
        f"{base.path}: the base has no tensor for the layer {layer!r}. If transformers renames it on load, merge in "
        f"memory (merge_and_unload, save_pretrained). {nearest(wanted, base.names)}"
    )


def by_live_names(base: Checkpoint, layers: Iterable[str]) -> Checkpoint:
    """Get the base under the names of the live model if some of these layers are not found otherwise; else as it is."""
    try:
        for layer in layers:
            base_tensor(layer, base)
    except AdapterError:
        kind = class_named(base.path) if base.path.is_dir() else None
        return base if kind is None else live_view(base, without_memory(kind, base.path)).checkpoint
    return base

"""Tensors that changed outside the adapted layers, saved whole as PEFT loads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from ..checkpoint import PEFT_PREFIX, Checkpoint
from ..export.architecture import Architecture, Place
from .extracted import RestTensor


@dataclass
class Rest:
    """Modules and biases that are saved whole in an adapter's folder."""

    modules: dict[str, None] = field(default_factory=dict)
    """modules_to_save, in order."""
    biases: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Under PEFT's names in a file."""
    names: set[str] = field(default_factory=set)
    """The names in TUNED of the saved tensors."""


def saved_whole(
    rest: Iterable[RestTensor], architecture: Architecture, tuned: Checkpoint, adapted: Collection[str]
) -> Rest:
    """Get the changed tensors outside the adapted layers, as many as PEFT can load.

    Whole modules (norms, embeddings, heads) go to modules_to_save, biases of adapted layers next to the adapter. A
    module that holds adapted layers, whose name PEFT would also find elsewhere, or that the live model does not have
    (experts that transformers joins on load) cannot be saved whole.
    """
    places = {name: architecture.place(name, shape) for name, shape in tuned.shapes.items()}
    paths = set(architecture.modules) or {place.module for place in places.values()}
    saved = Rest()
    for tensor in rest:
        place = places[tensor.name]
        if place.module in adapted and tensor.name.endswith(".bias"):
            saved.biases = True
            saved.tensors[f"{PEFT_PREFIX}{place.module}.base_layer.bias"] = tuned.tensor(tensor.name)
            saved.names.add(tensor.name)
        elif _can_be_saved(place, paths, adapted) and (not architecture.modules or place.saved_with in paths):
            saved.modules[place.saved_with] = None
            saved.names.add(tensor.name)
    for module in saved.modules:
        _add_module(saved, module, places, tuned)
    for module in list(saved.modules):
        # PEFT's copy of an embedding is tied to nothing, so each module that shares it needs the same numbers.
        for other in sorted(architecture.tied_to(module) - {module}):
            if not _inside(other, places):
                _add_module(saved, module, places, tuned, under=other)
                saved.modules[other] = None
    return saved


def _can_be_saved(place: Place, paths: set[str], adapted: Collection[str]) -> bool:
    home = place.saved_with
    if not home or any(layer == home or layer.startswith(home + ".") for layer in adapted):
        return False
    # PEFT takes every module whose path ends with the name, be it in the middle of a word.
    return not any(path.endswith(home) and path != home for path in paths)


def _inside(module: str, places: dict[str, Place]) -> list[str]:
    return [name for name, place in places.items() if f"{place.module}.".startswith(f"{module}.")]


def _add_module(
    saved: Rest, module: str, places: dict[str, Place], tuned: Checkpoint, under: str | None = None
) -> None:
    for name in _inside(module, places):
        place = places[name]
        path = (under or module) + place.module.removeprefix(module)
        saved.tensors[f"{PEFT_PREFIX}{path}.{name.rpartition('.')[2]}"] = tuned.tensor(name)

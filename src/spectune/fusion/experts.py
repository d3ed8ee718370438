"""Adapters of experts (target_parameters): which results they have, and how the result names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..adapter.base_names import parameter_of
from ..errors import AdapterError
from .adapters import Adapter


def expert_parameters(adapters: Sequence[Adapter]) -> list[str]:
    """Get everything that the adapters name in target_parameters."""
    named = [adapter.folder.config.get("target_parameters") for adapter in adapters]
    return sorted({str(word) for words in named if isinstance(words, list) for word in words})


def refuse_lora_of_experts(adapters: Sequence[Adapter], what: str) -> None:
    """Raise `AdapterError` where adapters of experts would become a LoRA: only an export writes one of those."""
    for adapter in adapters:
        refuse_lora_of(adapter.layers, expert_parameters([adapter]), f"{adapter.folder.path}: {what}")


def refuse_lora_of(layers: Iterable[str], named: Iterable[str], what: str) -> None:
    """Raise `AdapterError` if one of these layers is an expert of a parameter in `named`."""
    named = list(named)
    layer = next((layer for layer in layers if parameter_of(layer, named)), None)
    if layer is not None:
        raise AdapterError(
            f"{what} writes a LoRA, and {layer} is an expert, which only rule='spectral' fuses, as spectral_a. Fuse "
            "with that rule and export the result, or merge one adapter after the other."
        )


def split_targets(layers: Iterable[str], named: Iterable[str]) -> tuple[list[str], list[str]]:
    """Get the layers that are not experts, and the parameters of those that are; `AdapterError` for a part of one."""
    plain: list[str] = []
    places: dict[str, set[int]] = {}
    named = list(named)
    for layer in sorted(layers):
        path = parameter_of(layer, named)
        if path is None:
            plain.append(layer)
        else:
            places.setdefault(path, set()).add(int(layer.rpartition(".")[2]))
    for path, found in places.items():
        if missing := set(range(max(found))) - found:
            raise AdapterError(
                f"{path}.{min(missing)}: the adapters leave out this expert and do not agree on their targets, so no "
                "config names what is left. Fuse adapters with the same target_parameters and exclude_modules."
            )
    return plain, sorted(places)

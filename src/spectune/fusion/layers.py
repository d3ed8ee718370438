"""`Layers`: what the adapters do, layer by layer, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint
from ..errors import OptionError
from .activations import Grams
from .adapters import Adapter
from .contract import Part


class Layers(Mapping[str, list[Part]]):
    """Layer -> the updates of the adapters that have it, in their order.

    A LoRA's factors are read from its file each time, so that merging many large ones takes the memory of one layer;
    the updates of spectral adapters, which are computed on the base, are kept.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        base: Checkpoint | None,
        activations: Sequence[Mapping[str, torch.Tensor]] | None,
    ) -> None:
        if len({adapter.name for adapter in adapters}) < len(adapters):
            raise OptionError("the same adapter is named twice. Name it once, with a larger weight.")
        self._owners = [adapter.parts(base) for adapter in adapters]
        self._grams: Sequence[Mapping[str, torch.Tensor]] = activations or [Grams() for _ in adapters]
        self._names = sorted({layer for parts in self._owners for layer in parts})

    @property
    def everywhere(self) -> bool:
        """Whether all adapters have all layers."""
        return all(len(parts) == len(self) for parts in self._owners)

    def __getitem__(self, layer: str) -> list[Part]:
        return [
            replace(parts[layer], gram_II=grams.get(layer))
            for parts, grams in zip(self._owners, self._grams, strict=True)
            if layer in parts
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

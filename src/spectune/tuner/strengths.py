"""The strengths of the adapters of one layer, under the names by which PEFT and diffusers set them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapter import SpectralModule


class Strengths:
    """The part of an adapted layer that weakens and strengthens its adapters."""

    module_name: str
    merged_adapters: list[str]
    active_adapters: Any
    spectune_adapter: nn.ModuleDict
    module: Callable[[str], SpectralModule]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of one adapter: 1 as trained, 0 for none. A rotation gets a smaller angle, not a mixture."""
        if adapter in self.merged_adapters:
            raise ValueError(f"{self.module_name}: adapter {adapter!r} is merged. Call unmerge_adapter first.")
        if adapter in self.spectune_adapter:
            self.module(adapter).strength = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters, as a pipeline of diffusers does for one call."""
        for name in self.active_adapters:
            if name in self.spectune_adapter:
                self.set_scale(name, self.module(name).strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters again; without a number, set it to 1."""
        for name in self.active_adapters:
            if name in self.spectune_adapter:
                self.set_scale(name, 1.0 if scale is None else self.module(name).strength / scale)

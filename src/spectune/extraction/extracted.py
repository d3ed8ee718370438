"""The result of an extraction: how much of the change the adapter holds, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExtractedLayer:
    """One adapted layer, measured in the written file."""

    name: str
    rank: int
    change: float
    """|dW|_F."""
    relative: float
    """|dW|_F, as a fraction of |W|_F."""
    lost: float
    """|W_tuned - (W_base + adapter)|_F, as a fraction of |dW|_F."""
    best: float
    """The same for the best adapter of this form and rank, before it was rounded and written."""

    @property
    def kept(self) -> float:
        """The share of |dW|_F^2 that is in the adapter."""
        return max(0.0, 1 - self.lost**2)


@dataclass(frozen=True)
class RestTensor:
    """A tensor that changed but is not in an adapted layer."""

    name: str
    why: str
    change: float
    """|tuned - base|_F, or the norm of a tensor that only TUNED has."""
    relative: float | None
    """The same as a fraction of |base|_F; None if the base does not have the tensor or it is zero."""
    saved: bool
    """Whether it is saved whole in the adapter's folder."""


@dataclass(frozen=True)
class Extracted:
    """An adapter extracted from a full fine-tune: its folder, and how much of the change it holds."""

    path: Path
    form: str
    layers: tuple[ExtractedLayer, ...] = field(repr=False)
    rest: tuple[RestTensor, ...] = field(repr=False)
    unchanged: tuple[str, ...] = field(repr=False)
    """Tensors that are equal in both models."""
    excluded: tuple[str, ...] = field(repr=False)
    told_by: str
    """Where the kinds of the layers come from: a model class, or `tensor names`."""
    dtypes: tuple[str, ...]
    """Dtypes of both models. If they differ, part of the change is rounding."""
    bytes: int

    @property
    def kept(self) -> float:
        """The share of the adapted layers' sum of |dW|_F^2 that is in the adapter."""
        total = sum(layer.change**2 for layer in self.layers)
        return 1 - sum((layer.lost * layer.change) ** 2 for layer in self.layers) / total

    @property
    def left_out(self) -> tuple[RestTensor, ...]:
        """The changed tensors that are not in the folder: only the tuned model has them."""
        return tuple(tensor for tensor in self.rest if not tensor.saved)

    @property
    def left_out_share(self) -> float:
        """|change|_F of the tensors left out, as a fraction of that of the whole model."""
        out = sum(tensor.change**2 for tensor in self.left_out)
        rest = sum(tensor.change**2 for tensor in self.rest)
        return math.sqrt(out / (rest + sum(layer.change**2 for layer in self.layers)))

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        layers = [asdict(layer) | {"kept": layer.kept} for layer in self.layers]
        return asdict(self) | {
            "path": str(self.path),
            "layers": layers,
            "kept": self.kept,
            "left_out_share": self.left_out_share,
        }

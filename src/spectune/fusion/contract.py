"""`Fusion`: what a rule must provide. `Part`: what it gets from each adapter, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar

import torch

from ..algebra import to_factors
from ..methods import Method
from ..records import Delta, Spectrum
from .compact import Compact, compact


@dataclass(frozen=True)
class Stored:
    """How the base stores the weight of a layer, as far as known."""

    transposed: bool = False
    """in x out (transformers' Conv1D)."""
    kernel: tuple[int, ...] = ()
    """The sides of a convolution's kernel; empty for a linear layer."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one adapter does to one layer, in float64."""

    adapter: str
    layer: str
    delta: Delta
    method: Method | None = None
    """None for a LoRA."""
    basis: Spectrum | None = None
    """For spectral methods that tune chosen columns: these directions, with their columns in the spectrum."""
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    gram_II: torch.Tensor | None = None
    """sum_n x_n x_n^T over the inputs that this adapter's own examples send into the layer; a mean behind what is
    merged, for rules that look there."""
    cross_II: torch.Tensor | None = None
    """mean_n z_n x_n^T: inputs in the adapter's own model by those behind what is merged, token by token."""
    weight_OI: torch.Tensor | None = None
    """The base weight, for rules that look behind what is merged."""
    stored: Stored = Stored()

    @property
    def columns(self) -> tuple[int, ...]:
        """The singular columns that were tuned; empty for methods without any."""
        return self.basis.columns if self.basis is not None else ()

    @cached_property
    def compact(self) -> Compact:
        """The singular value decomposition of the update."""
        return compact(self.delta)


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One way to make one update out of several, layer by layer.

    A subclass adds its options as fields and is listed in `FUSIONS`. One adapter at weight 1 gives back its own
    update, and the order of the adapters does not matter.
    """

    name: ClassVar[str]
    """The word in `fuse(rule=...)` and on the command line."""
    paper: ClassVar[str]
    """Title and arXiv number."""
    whole_weights: ClassVar[bool] = False
    """Whether the weights are 1 by default, and not 1/N."""
    behind: ClassVar[bool] = False
    """Whether it looks at each layer behind the layers that are merged already, so that it needs the base model."""
    compares: ClassVar[bool] = False
    """Whether it also looks at what reaches the layer in each adapter's own model (`Part.cross_II`)."""

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        """Get the fused update of one layer; `AdapterError` or `OptionError` names the layer and the reason."""
        raise NotImplementedError

    def is_linear(self) -> bool:
        """Ask whether k times the weights give k times the update."""
        return False

    @classmethod
    def options(cls) -> dict[str, object]:
        """Get the options of this rule with their defaults."""
        return {option.name: option.default for option in fields(cls)}


def stacked(parts: Sequence[Part], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Get (B_OP, A_PI) with B A = sum_i weight_i dW_i, by stacking the factors of all updates."""
    pairs = [to_factors(part.delta) for part in parts]
    left = torch.cat([weight * B_OP for weight, (B_OP, _) in zip(weights, pairs, strict=True)], dim=1)
    return left, torch.cat([A_PI for _, A_PI in pairs])


def of_factors(parts: Sequence[Part], B_OP: torch.Tensor, A_PI: torch.Tensor) -> Part:
    """Get the fused part of a layer with the update B A."""
    return Part("fused", parts[0].layer, Delta(B_OP, B_OP.new_ones(A_PI.shape[0]), A_PI), stored=parts[0].stored)


def of_compact(parts: Sequence[Part], found: Compact) -> Part:
    """Get the fused part of a layer from its singular value decomposition, which is then not computed again."""
    part = Part("fused", parts[0].layer, Delta(found.X_OP, found.S_P, found.Yh_PI), stored=parts[0].stored)
    vars(part)["compact"] = found  # where cached_property looks
    return part

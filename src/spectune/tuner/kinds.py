"""The kinds of adapted layers: what one adapter adds to the output of each."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..algebra import dense, through_core
from ..methods import SpectralModule
from .layer import SpectralAdapted


class SpectralLinear(SpectralAdapted):
    """A linear layer: nn.Linear, transformers' Conv1D, or one quantised by bitsandbytes or torchao."""

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, module(self._cast_input_dtype(x, module.S_R.dtype)))


class SpectralConvLinear(SpectralAdapted):
    """A convolution, as a linear map of flattened patches. (PEFT's all-linear knows tuner layers by "Linear".)

    The right factor is a convolution with Q output channels, core and left factor act on channels. With
    groups every group sees other inputs, so there the dense kernel is built; it is small, being grouped.
    """

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        base, delta = self.get_base_layer(), module.training_delta()
        x = self._cast_input_dtype(x, module.S_R.dtype)
        if base.groups != 1:
            grouped: torch.Tensor = base._conv_forward(x, dense(delta).reshape(self.stored_shape), None)
            return grouped
        channels = 1 - len(self.stored_shape)  # counted from the end: a single sample has no batch axis
        kernel = delta.right_QI.reshape(-1, *self.stored_shape[1:])
        z_NQ = base._conv_forward(x, kernel, None).movedim(channels, -1)
        return F.linear(through_core(z_NQ, delta.core), delta.left_OP).movedim(-1, channels)


class SpectralEmbedding(SpectralAdapted):
    """A table of vectors, as a linear map of one-hot rows: looked up in the right factor, never multiplied out."""

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        delta = module.training_delta()
        z_NQ = F.embedding(x, delta.right_QI.T)
        added = F.linear(through_core(z_NQ, delta.core), delta.left_OP)
        scale = self._get_embed_scale()
        return added if scale is None else added * scale


class SpectralAttentionLinear(SpectralAdapted):
    """torch's nn.MultiheadAttention: its packed q, k, v weight has adapters here, its out_proj an adapted layer inside.

    torch reads both weights directly and never calls out_proj, so each forward builds them in full.
    """

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(f"{self.module_name}: adapter_names is not supported by MultiheadAttention.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.get_base_layer()
        out_proj = base.out_proj
        weights = {"in_proj_weight": tuned_weight(self), "out_proj.weight": _tuned_out(out_proj)}
        if isinstance(out_proj, SpectralAdapted):
            base.out_proj = out_proj.get_base_layer()
        try:
            return torch.func.functional_call(base, weights, (query, key, value), kwargs)
        finally:
            base.out_proj = out_proj


def _tuned_out(out_proj: nn.Module) -> torch.Tensor:
    if isinstance(out_proj, SpectralAdapted):
        return tuned_weight(out_proj)
    return cast(torch.Tensor, out_proj.weight)


def tuned_weight(layer: SpectralAdapted) -> torch.Tensor:
    """Get the stored weight plus the updates of the active adapters, differentiable in their numbers."""
    weight: torch.Tensor = getattr(layer.get_base_layer(), layer.layout.attribute)
    if layer.disable_adapters or layer.merged:
        return weight
    total = weight
    for module in layer.active_modules():
        update = layer.layout.from_matrix(dense(module.training_delta()), layer.stored_shape)
        total = total + update.to(weight.dtype)
    return total


KINDS: dict[str, type[SpectralAdapted]] = {
    "linear": SpectralLinear,
    "conv": SpectralConvLinear,
    "embedding": SpectralEmbedding,
    "attention": SpectralAttentionLinear,
}

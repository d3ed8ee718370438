"""The adapted layer for torch's nn.MultiheadAttention, which reads weights that belong to layers it never calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..adapter import at_hand, forward_of
from ..errors import SpectuneError, UnknownOptionError
from .layer import SpectralAdapted


class SpectralAttentionLinear(SpectralAdapted):
    """torch's nn.MultiheadAttention: its packed q, k, v weight has adapters here, its out_proj an adapted layer inside.

    torch reads both weights directly and never calls out_proj, so each forward builds them in full.
    """

    _qkv_same_embed_dim = False
    """Keeps nn.TransformerEncoderLayer off its fast path, which reads the untuned weights past this layer."""

    def __getattr__(self, name: str) -> Any:
        """Get what the attention has and this layer has not (`batch_first`, `num_heads`): its parents ask for them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or a copy is being made
                raise
            return getattr(self.get_base_layer(), name)

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise UnknownOptionError(
                f"{self.module_name}: MultiheadAttention does not support mixed adapter batches (adapter_names). Run "
                f"the rows of each adapter by themselves."
            )
        base = self.get_base_layer()
        out_proj = base.out_proj
        for layer in (self, out_proj):
            if isinstance(layer, SpectralAdapted) and layer.disable_adapters and layer.merged:
                layer.unmerge()
        inner = out_proj.get_base_layer() if isinstance(out_proj, SpectralAdapted) else out_proj
        run = forward_of(base)
        with at_hand(base), at_hand(inner):
            in_proj_weight, out_weight = self.tuned_weight(), _tuned_out(out_proj)
            base.out_proj = inner
            try:
                with reading(base, "in_proj_weight", in_proj_weight), reading(inner, "weight", out_weight):
                    return run(*(x.to(in_proj_weight.device) for x in (query, key, value)), *args, **kwargs)
            finally:
                base.out_proj = out_proj

    def adapt_out_proj(self, kind: type[SpectralAdapted], adapter_name: str, *given: Any) -> None:
        """Put an adapted layer in the place of out_proj; `given` are a config, r, and the owners of shared numbers."""
        base, (config, r, owners) = self.get_base_layer(), given
        name = f"{self.module_name}.out_proj"
        base.out_proj = kind(base.out_proj, adapter_name, config, name, r, owners)

    def update_out_proj(self, adapter_name: str, *given: Any) -> None:
        """Attach one more adapter to out_proj, which is adapted; nothing is attached when anything is wrong."""
        config, r, owners = given
        out_proj, name = self.get_base_layer().out_proj, f"{self.module_name}.out_proj"
        try:
            out_proj.update_layer(adapter_name, config, name, r, owners)
        except SpectuneError:
            del self.spectune_adapter[adapter_name]
            raise

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Get the attention without adapters, as PEFT asks of a layer with an adapted layer inside."""
        base: nn.Module = self.get_base_layer()
        inner: Any = base.out_proj
        for layer in (self, inner):
            if merge and isinstance(layer, SpectralAdapted):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._restore_weights()
        if isinstance(inner, SpectralAdapted):
            base.out_proj = inner.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Make both weights parameters again, if another tool (FSDP, PEFT) has put plain tensors in their places."""
        base = self.get_base_layer()
        inner = base.out_proj.get_base_layer() if isinstance(base.out_proj, SpectralAdapted) else base.out_proj
        for module, name in ((base, "in_proj_weight"), (inner, "weight")):
            if (tensor := vars(module).pop(name, None)) is not None:
                module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))


def _tuned_out(out_proj: nn.Module) -> torch.Tensor:
    if isinstance(out_proj, SpectralAdapted):
        return out_proj.tuned_weight()
    return cast(torch.Tensor, out_proj.weight)


@contextmanager
def reading(module: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """Have a module read another tensor in the place of one of its own: a parameter, or what FSDP1 puts before it."""
    place: dict[str, Any] = vars(module) if name in vars(module) else module._parameters
    held, place[name] = place[name], tensor
    try:
        yield
    finally:
        place[name] = held

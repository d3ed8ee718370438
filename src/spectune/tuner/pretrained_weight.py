"""The pretrained weight of an adapted layer: read as W_OI, kept aside while another stands in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from .base_weight import Layout
from .bases import plain_weight
from .cut_weights import outline, whole_copy


class PretrainedWeight:
    """What an adapted layer does with the weight of its base; it is never written."""

    layout: Layout
    module_name: str
    quantization_backend: QuantizationBackend | None
    get_base_layer: Callable[[], Any]
    _replaced: list[nn.Parameter]

    def original_matrix(self) -> torch.Tensor:
        """Get the pretrained W_OI, also while adapters are merged into the base.

        Where ZeRO-3 has cut it, a whole copy: all processes must call this.
        """
        return self.layout.to_matrix(self._original())

    def _original(self) -> torch.Tensor:
        if self._replaced:
            return self._replaced[0].data
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        if self.is_cut:
            return whole_copy(self.stored)
        return plain_weight(self.get_base_layer(), self.layout.attribute, self.module_name)

    def _outline(self) -> torch.Tensor:
        """Get the pretrained weight where it is at hand, else a tensor of its shape and dtype."""
        return outline(self.stored) if self.is_cut else self._original()

    @property
    def is_cut(self) -> bool:
        """Whether ZeRO-3 has cut the base weight, so that this process holds a part of it."""
        return hasattr(getattr(self.get_base_layer(), self.layout.attribute, None), "ds_id")

    @property
    def stored(self) -> torch.Tensor:
        """The base layer's own tensor."""
        return getattr(self.get_base_layer(), self.layout.attribute)  # type: ignore[no-any-return]

    def _exchange(self, parameter: nn.Parameter) -> nn.Parameter:
        """Put another parameter in the base layer's place for it, and get the one that stood there.

        The parameter is exchanged and not overwritten: a weight that is tied to another layer's stays as it is there.
        """
        present: nn.Parameter = getattr(self.get_base_layer(), self.layout.attribute)
        setattr(self.get_base_layer(), self.layout.attribute, parameter)
        return present

    def _put(self, merged: torch.Tensor) -> None:
        """Put a merged weight in the place of the pretrained one, which is kept aside."""
        present = self._exchange(nn.Parameter(merged, requires_grad=False))
        self._replaced = self._replaced or [present]

    def _put_back(self) -> None:
        """Put the pretrained weight back in its place."""
        (pretrained,) = self._replaced
        merged = self._exchange(pretrained)
        pretrained.data = pretrained.data.to(merged.device, merged.dtype)  # the model may have moved since
        self._replaced = []

"""The layers that can be adapted, and how each stores its weight: always read here as W_OI."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import WeightError


@dataclass(frozen=True)
class Layout:
    """How one kind of layer stores its matrix."""

    kind: str
    """`linear`, `conv`, `embedding`, `attention` or `expert`: which adapted layer serves it."""
    transposed: bool = False
    """True if the layer stores in x out."""
    attribute: str = "weight"
    """The name of the stored tensor."""

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Get W_OI from the stored tensor, without a copy. A kernel is flattened to O x (I k k), as in the papers."""
        return weight.T if self.transposed else weight.flatten(1)

    def from_matrix(self, W_OI: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Get the stored form of a matrix."""
        return W_OI.T if self.transposed else W_OI.reshape(shape)


# An embedding maps one-hot rows of the vocabulary to vectors, so its stored V x E is in x out.
LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: Layout("linear"),
    Conv1D: Layout("linear", transposed=True),
    nn.Conv1d: Layout("conv"),
    nn.Conv2d: Layout("conv"),
    nn.Conv3d: Layout("conv"),
    nn.Embedding: Layout("embedding", transposed=True),
    nn.MultiheadAttention: Layout("attention", attribute="in_proj_weight"),
}


def layout_of(layer: nn.Module, name: str, backend: QuantizationBackend | None = None) -> Layout:
    """Get the layout of a layer; `WeightError` names the layer and what can be adapted."""
    if backend is not None:
        if backend.layer_type == "linear" and backend.supports_merge:
            return Layout("linear")
        raise WeightError(
            f"{name}: a weight quantised by {backend.backend_name} cannot be dequantised. Load the base in half "
            f"precision, or with bitsandbytes or torchao."
        )
    for kind, layout in LAYOUTS.items():
        if isinstance(layer, kind):
            if layout.kind == "attention" and layer.in_proj_weight is None:
                raise WeightError(f"{name}: attention with separate q, k, v sizes is not supported. Exclude it.")
            return layout
    known = ", ".join(kind.__name__ for kind in LAYOUTS)
    raise WeightError(
        f"{name}: a {type(layer).__name__} is not supported, only {known}. Remove it from target_modules."
    )


def backend_of(layer: nn.Module) -> QuantizationBackend | None:
    """Get the backend that dequantises a layer's weight, or None for plain numbers."""
    if type(layer) in LAYOUTS and type(getattr(layer, "weight", None)) is nn.Parameter:
        return None  # without importing the quantisation libraries to find that out
    # PEFT asks for the re-quantising function of torchao models here. Spectune never merges into a
    # quantised weight, so that function is never called.
    backend: QuantizationBackend | None = resolve_quantization_backend(layer, get_apply_tensor_subclass=_never)
    return backend


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU, and unpack those that are.

    It packs them at the first forward in eval mode (processors with AVX512-BF16, bitsandbytes 0.50), and does not see
    that they are packed when it dequantises or when it multiplies with a gradient: both give wrong numbers.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                layer.state_dict()  # unpacks the weight in place


def _never() -> None:
    raise AssertionError("a quantised base weight is never written")

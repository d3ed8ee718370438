"""A layer as one matrix: its weight, the rows that it multiplies, and what an update adds to its output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..algebra import apply, through_core
from ..records import Delta


def input_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Get the input of a layer out of what it was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def multiplies(layer: nn.Module) -> bool:
    """Ask whether a layer multiplies its input by a matrix (a quantised one is stored as a matrix too)."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def convolves(layer: nn.Module) -> bool:
    """Ask whether a layer multiplies patches of its input by one matrix, `weight.flatten(1)`."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return False
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def rows_of(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Get what a layer multiplies by its matrix as rows x_NI; a linear one's without what the mask hides."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return _patches(layer, x)
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def window_of(layer: nn.Module) -> tuple[Any, ...]:
    """Get what decides, beside the input, which rows a layer multiplies: layers that agree in both see the same."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return ()
    return layer.kernel_size, layer.dilation, layer.padding, layer.stride


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """Get the matrix W_OI of a layer."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear) or weight.ndim > 2:
        flat: torch.Tensor = weight.detach().flatten(1)
        return flat
    stored: torch.Tensor = weight.detach().T  # transformers' Conv1D stores inputs first
    return stored


def update_of(layer: nn.Module, delta: Delta, x: torch.Tensor) -> torch.Tensor:
    """Get what an update of the layer's matrix adds to the output, without building the update."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return apply(delta, x)
    channels = 1 - layer.weight.ndim  # counted from the end: a single sample has no batch axis
    kernel = delta.right_QI.reshape(-1, *layer.weight.shape[1:])
    z_NQ = layer._conv_forward(x, kernel, None).movedim(channels, -1)  # type: ignore[arg-type]
    return F.linear(through_core(z_NQ, delta.core), delta.left_OP).movedim(-1, channels)


def _patches(layer: nn.Conv1d | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Get what a convolution multiplies by its weight as rows, in the order of `weight.flatten(1)`."""
    sizes = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    if isinstance(layer, nn.Conv1d):  # an image of height one
        x, sizes = x.unsqueeze(-2), [(fill, *size) for fill, size in zip((1, 1, 0, 1), sizes, strict=True)]  # type: ignore[misc]
    images = x if x.ndim == 4 else x[None]
    kernel, dilation, padding, stride = sizes
    return nn.functional.unfold(images, kernel, dilation, padding, stride).mT.flatten(0, 1)  # type: ignore[arg-type]

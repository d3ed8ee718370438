"""`collect_grams`: the inputs that an adapter's own examples give its layers, as one Gram matrix per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..adapter import in_eval_mode, spectral_modules
from ..checkpoint import PEFT_PREFIX
from ..errors import OptionError, nearest
from .layer_inputs import convolves, input_in, multiplies, rows_of

Grams = dict[str, torch.Tensor]


class _GramSums:
    """Adds up x x^T while the model runs; the inputs themselves are not kept."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.grams: Grams = {}
        self.mask: torch.Tensor | None = None

    def hook(self, name: str, layer: nn.Module) -> Callable[..., None]:
        inner = _innermost(layer)
        readable = convolves(inner) or multiplies(inner)

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_in(args, kwargs)
            if not readable or not isinstance(x, torch.Tensor) or not x.is_floating_point():
                raise OptionError(
                    f"{name}: gradient fusion can only read the inputs of linear layers and of ungrouped convolutions "
                    f"with zero padding, and this is a {type(inner).__name__}. Name the layers to collect with "
                    "layers=[...]."
                )
            x_NI = rows_of(inner, x, self.mask).detach().to(self.dtype)
            gram_II = (x_NI.mT @ x_NI).cpu()
            self.grams[name] = self.grams[name].add_(gram_II) if name in self.grams else gram_II

        return add


def _innermost(layer: nn.Module) -> Any:
    """Get the base's own layer from inside the adapters wrapped around it."""
    while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
        layer = inner
    return layer


@torch.no_grad()
def collect_grams(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    layers: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Grams:
    """Get G_II = sum_n x_n x_n^T of the inputs of every adapted layer, for `fuse(rule="gradient")`.

    The inputs of a convolution are its patches, in the order of `weight.flatten(1)`: I is channels times kernel size.

    `model` carries the adapter (through PEFT or `load_adapter`), `batches` are its own prompts or examples: keyword
    arguments of the model, or one tensor. Tokens that an `attention_mask` hides are left out. `layers` names other
    layers than the adapted ones, or some of them: one I x I matrix per layer is kept, on the CPU in `dtype`. In
    float32 the smallest eigenvalues drown in roundoff and `eps` must be larger. The model runs in eval mode; afterwards
    its mode is restored.
    `OptionError` for a name that is not a layer, a layer that no batch went through, or one that is neither linear
    nor an ungrouped convolution (1d, 2d) with zero padding.
    """
    wanted = _layers(model, layers)
    running = _GramSums(dtype)
    with ExitStack() as stack:
        for name, layer in wanted.items():
            handle = layer.register_forward_pre_hook(running.hook(name, layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(in_eval_mode(model))
        for batch in batches:
            running.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            model(batch) if isinstance(batch, torch.Tensor) else model(**batch)
    unused = [name for name in wanted if name not in running.grams]
    if unused:
        raise OptionError(f"{unused[0]}: no batch went through this layer. Pass batches that use it, or other layers.")
    return running.grams


def _layers(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    """Get name in the base model -> layer."""
    known = {_base_path(path): module for path, module in reversed([*model.named_modules()]) if path}
    if layers is None:
        spectral = {_base_path(path) for path, _, _ in spectral_modules(model)}
        lora = {_base_path(path) for path, module in model.named_modules() if hasattr(module, "lora_A")}
        layers = sorted(spectral | lora)
        if not layers:
            raise OptionError(f"{type(model).__name__}: the model has no adapter. Load one, or pass layers=[...].")
    for name in (layers := list(layers)):
        if name not in known:
            raise OptionError(f"{name!r} is not a layer of {type(model).__name__}. {nearest(name, list(known))}")
    return {name: known[name] for name in layers}


def _base_path(path: str) -> str:
    return path.removeprefix("_orig_mod.").removeprefix(PEFT_PREFIX).replace(".base_layer", "")

"""`layer_spectra`: what tuning did to the singular values of a live model's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..adapter import SpectralModule, spectral_modules
from ..algebra import dense
from ..checkpoint import PEFT_PREFIX
from ..errors import OptionError, nearest
from .result import LayerSpectrum

# What PEFT puts before the path of every module of the base model.


def layer_spectra(model: nn.Module, names: Sequence[str] | None = None, count: int = 3) -> list[LayerSpectrum]:
    """Get all singular values of W and of W + dW for some adapted layers.

    `names` are layer paths in the base model; without them `count` layers are taken, spread evenly from
    the first adapted layer to the last. dW is the sum of the layer's active adapters at their strength.
    Each layer costs two full SVDs (values only, float32), so small differences are only known down to
    about 1e-6 of the largest singular value.
    """
    layers: dict[str, list[SpectralModule]] = {}
    for path, adapter, module in spectral_modules(model):
        modules = layers.setdefault(path, [])
        if adapter in getattr(model.get_submodule(path), "active_adapters", [adapter]):
            modules.append(module)
    if not layers:
        raise OptionError(f"{type(model).__name__}: the model carries no spectral adapter. Attach or load one first.")
    paths = _spread(list(layers), count) if names is None else _named(list(layers), names)
    return [_layer_spectrum(model, path, layers[path]) for path in paths]


def _spread(paths: list[str], count: int) -> list[str]:
    if count < 1:
        raise OptionError(f"layer_spectra: asked for {count} layers. Pass a count of 1 or more.")
    last = len(paths) - 1
    places = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [paths[place] for place in sorted(places)]


def _named(paths: list[str], names: Sequence[str]) -> list[str]:
    known = {path.removeprefix(PEFT_PREFIX): path for path in paths}
    for name in names:
        if name.removeprefix(PEFT_PREFIX) not in known:
            raise OptionError(f"layer_spectra: no adapted layer is called {name!r}. {nearest(name, list(known))}")
    return [known[name.removeprefix(PEFT_PREFIX)] for name in names]


@torch.no_grad()
def _layer_spectrum(model: nn.Module, path: str, modules: list[SpectralModule]) -> LayerSpectrum:
    layer = model.get_submodule(path)
    W_OI = layer.original_matrix().detach().float()  # type: ignore[operator]
    tuned_OI = W_OI.clone()
    for module in modules:
        tuned_OI += dense(module.delta()).to(W_OI)
    before, after = (torch.linalg.svdvals(matrix).tolist() for matrix in (W_OI, tuned_OI))
    return LayerSpectrum(name=path.removeprefix(PEFT_PREFIX), before=before, after=after)

"""`layer_spectra`: the singular values of a live model's weights before and after tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..adapter import SpectralModule, spectral_modules
from ..algebra import dense
from ..checkpoint import PEFT_PREFIX
from ..errors import OptionError, nearest
from .result import LayerSpectrum

# PEFT's prefix of every module path in the base model.


def layer_spectra(model: nn.Module, names: Sequence[str] | None = None, count: int = 3) -> list[LayerSpectrum]:
    """Get all singular values of W and of W + dW for some adapted layers.

    `names` are layer paths in the base model; without them, `count` adapted layers are chosen, spread evenly from
    first to last. dW is the sum of the layer's active adapters at their strength.
    Each layer costs two full SVDs (values only, float32), so differences are exact only to about 1e-6 of the largest
    singular value.
    """
    layers: dict[str, list[SpectralModule]] = {}
    for path, adapter, module in spectral_modules(model):
        modules = layers.setdefault(path, [])
        if adapter in getattr(model.get_submodule(path), "active_adapters", [adapter]):
            modules.append(module)
    if not layers:
        raise OptionError(f"{type(model).__name__}: the model has no spectral adapter. Attach or load one first.")
    paths = _spread(list(layers), count) if names is None else _named(list(layers), names)
    return [_layer_spectrum(model, path, layers[path]) for path in paths]


def _spread(paths: list[str], count: int) -> list[str]:
    if count < 1:
        raise OptionError(f"layer_spectra: count={count}: must be at least 1.")
    last = len(paths) - 1
    places = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [paths[place] for place in sorted(places)]


def _named(paths: list[str], names: Sequence[str]) -> list[str]:
    known = {path.replace(PEFT_PREFIX, "", 1): path for path in paths}
    for name in names:
        if name.replace(PEFT_PREFIX, "", 1) not in known:
            raise OptionError(f"layer_spectra: the adapted layer {name!r} does not exist. {nearest(name, list(known))}")
    return [known[name.replace(PEFT_PREFIX, "", 1)] for name in names]


@torch.no_grad()
def _layer_spectrum(model: nn.Module, path: str, modules: list[SpectralModule]) -> LayerSpectrum:
    layer = model.get_submodule(path)
    W_OI = layer.original_matrix().detach().float()  # type: ignore[operator]
    tuned_OI = W_OI.clone()
    for module in modules:
        tuned_OI += dense(module.delta()).to(W_OI)
    before, after = (torch.linalg.svdvals(matrix).tolist() for matrix in (W_OI, tuned_OI))
    return LayerSpectrum(name=path.replace(PEFT_PREFIX, "", 1), before=before, after=after)

"""The bases of quantised layers, found on the full-precision weights that they were quantised from.

Then the adapter also fits the full-precision model, and merges into it. The files are read tensor by tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter.saved import LayerRanks
from ..checkpoint import Base, Checkpoint, model_at_hand
from ..checkpoint.live_names import live_view
from ..checkpoint.model_class import without_memory
from ..records import Spectrum, Weight
from ..spectrum import obtain, open_cache
from .base_weight import backend_of, layout_of
from .bases import basis_request, is_shared
from .config import SpectralConfig

# |dequantised - stored| / |stored|. Four bits are off by 0.1 (nf4 with nested scales by 0.6 on a 32 x 32 weight, the
# worst seen), the weights of another model by 1.4. Chosen between.
LARGEST_ROUNDING = 0.9
# The frames between here and the call of get_peft_model.
ABOVE_PEFT = 9


def bases_of_quantised(
    model: nn.Module,
    targets: Callable[[str], Any],
    config: SpectralConfig,
    ranks: LayerRanks,
    tick: Callable[[str], None],
) -> dict[str, Spectrum]:
    """Get path -> basis of the targeted quantised layers whose weight is at hand in full precision.

    The model's name says where its files are: a folder, or a name in the hub's cache (nothing is downloaded). A layer
    that is not here gets the basis of its dequantised weight, with a warning where the model has a name.
    """
    layers = dict(_quantised(model, targets))
    if not layers or config.basis_is_in_file or config.directions != "weight" or config.spectra:
        return {}
    base = _files_of(model)
    # Its names are those before quantisation and adapters.
    named = None if base is None else without_memory(type(model), base.model_folder)
    stored = None if base is None else live_view(base.checkpoint, named).checkpoint
    bases, cache = {}, open_cache(config.svd_options.cache_dir)
    for path, layer in layers.items():
        W_OI = None if stored is None else _full_weight(stored, path, layer)
        request = None if W_OI is None else basis_request(path, W_OI, config, ranks)
        if W_OI is not None and request is not None:
            (bases[path],) = obtain([Weight(path, W_OI)], request, cache, share=is_shared(config))
            tick(path)
    name = _name(model)
    if name and (missing := len(layers) - len(bases)):
        warnings.warn(
            f"{missing} of {len(layers)} quantised weights are not at hand in full precision ({name}), so the "
            f"adapter uses the singular vectors of the dequantised weights and only fits a base quantised like this.",
            stacklevel=ABOVE_PEFT,
        )
    return bases


def _quantised(model: nn.Module, targets: Callable[[str], Any]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if path and ".base_layer" not in path and ".spectune_" not in path and targets(path):
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if backend_of(layer) is not None:
                yield path, layer


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _files_of(model: nn.Module) -> Base | None:
    name = _name(model)
    return model_at_hand(name, getattr(model.config, "_commit_hash", None)) if name else None


def _full_weight(stored: Checkpoint, path: str, layer: nn.Module) -> torch.Tensor | None:
    """Get a layer's weight from the files; None if it is not there, or is not what the layer was quantised from."""
    name = f"{path}.weight"
    backend = backend_of(layer)
    if backend is None or name not in stored.files:
        return None
    rounded = layout_of(layer, path, backend).to_matrix(backend.get_base_weight(layer)).float()
    W_OI = stored.tensor(name, rounded.device)
    if W_OI.shape != rounded.shape or not W_OI.is_floating_point() or W_OI.element_size() < 2:
        return None
    distance = torch.linalg.vector_norm(rounded - W_OI.float())
    return W_OI if distance <= LARGEST_ROUNDING * torch.linalg.vector_norm(W_OI.float()) else None

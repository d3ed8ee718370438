"""A saved adapter and the tensors of its base -> modules, without a live model and one weight at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..checkpoint import AdapterFolder, Checkpoint
from ..errors import AdapterError, OptionError, nearest
from ..records import Spectrum, Weight
from ..spectrum import Request, obtain, open_cache
from .contract import Method
from .modules import ADAPTERS_ATTRIBUTE, SpectralModule
from .table import METHODS, build_method

PEFT_PREFIX = "base_model.model."


def rank_for(pattern: Mapping[str, int], layer: str) -> int | None:
    """Get the r that a rank_pattern gives a layer, or None."""
    for words, r in pattern.items():
        if re.match(rf"(.*\.)?({words})$", layer):
            return r
    return None


def saved_method(config: Mapping[str, Any], layer: str) -> Method:
    """Get the method of one layer from the config of a saved adapter."""
    name = str(config.get("method"))
    if name not in METHODS:
        raise OptionError(f"adapter_config.json: unknown method {name!r}. {nearest(name, list(METHODS))}")
    options = {option: config[option] for option in METHODS[name].options() if config.get(option) is not None}
    if isinstance(options.get("columns"), list):
        options["columns"] = tuple(options["columns"])
    r = rank_for(config.get("rank_pattern") or {}, layer)
    return build_method(name, options if r is None else {**options, "r": r})


def saved_modules(folder: AdapterFolder, base: Checkpoint) -> Iterator[tuple[str, str, bool, SpectralModule]]:
    """Get (layer, name of its base tensor, whether that is stored in x out, module) for every adapted layer.

    The basis is found on the base's own weight and turned onto the saved sketch, so `AdapterError` for a base that the
    adapter was not trained on. One base weight is in memory at a time.
    """
    owner: SpectralModule | None = None
    for layer, names in sorted(_by_layer(folder).items(), key=lambda item: "H" not in item[1]):
        tensor_name = base_tensor(layer, base)
        tensors = {name: folder.tensor(key) for name, key in names.items()}
        module, transposed = _fit(folder.config, layer, base.tensor(tensor_name), tensors, owner)
        owner = owner or module
        yield layer, tensor_name, transposed, module


def _by_layer(folder: AdapterFolder) -> dict[str, dict[str, str]]:
    """Get layer -> {tensor of its module: key in the file}."""
    found: dict[str, dict[str, str]] = {}
    for key in folder.names:
        layer, middle, name = key.removeprefix(PEFT_PREFIX).rpartition(f".{ADAPTERS_ATTRIBUTE}.")
        if middle:
            found.setdefault(layer, {})[name] = key
    return found


def base_tensor(layer: str, base: Checkpoint) -> str:
    """Get the name of a layer's weight in the checkpoint, which may lack the leading name of the model's body."""
    wanted = f"{layer}.weight"
    parts = wanted.split(".")
    for start in range(len(parts) - 1):
        if (name := ".".join(parts[start:])) in base.files:
            return name
    ending = [name for name in base.names if name.endswith("." + wanted)]
    if len(ending) == 1:
        return ending[0]
    raise AdapterError(
        f"{base.path}: the base has no tensor for the layer {layer!r}; transformers may rename them on load. Merge in "
        f"memory then (merge_and_unload, save_pretrained). {nearest(wanted, base.names)}"
    )


def _fit(
    config: Mapping[str, Any],
    layer: str,
    stored: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    owner: SpectralModule | None,
) -> tuple[SpectralModule, bool]:
    """Get the module with its saved numbers, and which way round the weight stands.

    A checkpoint does not say whether a matrix is stored in x out (transformers' Conv1D). The shapes of the trained
    tensors tell, and for a square weight the sketch does.
    """
    method, refused = saved_method(config, layer), None
    for transposed in (False, True):
        W_OI = stored.T if transposed else stored.flatten(1)
        if not _shapes_fit(method, W_OI, tensors):
            continue
        try:
            return _module(config, method, Weight(layer, W_OI), tensors, owner), transposed
        except AdapterError as error:
            refused = refused or error
    shape = "x".join(map(str, stored.shape))
    raise refused or AdapterError(
        f"{layer}: the saved numbers do not fit the base weight {shape}. Load the base that the adapter was trained on."
    )


def _shapes_fit(method: Method, W_OI: torch.Tensor, tensors: dict[str, torch.Tensor]) -> bool:
    shapes = method.trained_shapes(*W_OI.shape)
    return all(tuple(tensors[name].shape) == shape for name, shape in shapes.items() if name in tensors)


def _module(
    config: Mapping[str, Any],
    method: Method,
    weight: Weight,
    tensors: dict[str, torch.Tensor],
    owner: SpectralModule | None,
) -> SpectralModule:
    rows_O, cols_I = weight.W_OI.shape
    rank, columns = method.basis(rows_O, cols_I)
    embedded = "U_OR" in tensors
    if rank == 0 or embedded:
        spectrum = Spectrum.unknown(rows_O, cols_I, rank, weight.name)
    else:
        svd = {
            name: value for name, value in (config.get("svd") or {}).items() if name in ("solver", "tolerance", "seed")
        }
        (spectrum,) = obtain([weight], Request(rank, columns, **svd), open_cache())
    module = SpectralModule(method, spectrum, embed_basis=embedded, owner=owner)
    module.base_matrix = lambda: weight.W_OI
    missing = [name for name in module.state_dict() if name not in tensors]
    if missing:
        raise AdapterError(
            f"{weight.name}: the adapter file has no tensor {missing[0]!r}: it is incomplete. Copy it again."
        )
    module.load_state_dict(tensors)
    module.base_matrix = None
    return module

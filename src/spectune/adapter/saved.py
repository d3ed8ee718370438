"""A saved adapter and the tensors of its base -> modules, one weight at a time, without a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..checkpoint import PEFT_PREFIX, AdapterFolder, Checkpoint
from ..checkpoint.patterns import LayerPatterns
from ..checkpoint.stacks import StoredLayouts
from ..errors import AdapterError, OptionError, nearest, one_line
from ..methods.contract import Method
from ..methods.table import METHODS, build_method
from ..records import Spectrum, Weight
from ..spectrum import Request, obtain, open_cache
from .adapted_models import ADAPTERS_ATTRIBUTE
from .base_names import base_tensor as base_tensor
from .base_names import parameter_of as parameter_of
from .modules import SpectralModule
from .sharing import Owners

# The layout of the adapter file. A file with a higher number is refused.
FORMAT_VERSION = 1
# Above the directions of any weight (the largest vocabularies have 262,144 words). Methods loop over such options.
MOST_DIRECTIONS = 2**20
# numpy's RandomState has 32 bits, and lidb makes two seeds from one.
LARGEST_SEED = 2**31 - 1


def refuse_newer(version: object) -> None:
    """Raise `AdapterError` for a file in a newer format."""
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise AdapterError(
            f"adapter_config.json: the file has format {version!r}, but this release reads up to {FORMAT_VERSION}. "
            f"Upgrade spectune."
        )


def refuse_absurd(options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for numbers as in a damaged or hostile config, for which methods would loop for hours."""
    for option, value in options.items():
        most = LARGEST_SEED if option.endswith("seed") else MOST_DIRECTIONS
        if isinstance(value, int) and abs(value) > most:
            raise OptionError(f"{option}={value} is absurd (limit {most:,}). Correct it.")
    columns = options.get("columns", "top")
    if not isinstance(columns, (str, int, list, tuple)):
        raise OptionError(f"columns={columns!r}: must be a word, a start index or a list of columns.")
    if isinstance(columns, (list, tuple)):
        if not all(isinstance(place, int) for place in columns):
            raise OptionError(f"columns={columns!r}: a list of columns must contain only integers.")
        if len(set(columns)) < len(columns):
            raise OptionError(f"columns={columns!r}: a column occurs twice. Name each column once.")


class LayerRanks:
    """The r of each layer by one config's rank_pattern; use one for all layers, since its patterns share a deadline.

    All matrices of a parameter in `target_parameters` have the r of the parameter.
    """

    def __init__(self, rank_pattern: object, target_parameters: object = None) -> None:
        if not isinstance(rank_pattern or {}, Mapping):
            raise AdapterError(f"adapter_config.json: rank_pattern={rank_pattern!r} is not a map from layers to ranks.")
        self._ranks: Mapping[str, int] = rank_pattern or {}  # type: ignore[assignment]
        self._patterns = LayerPatterns(self._ranks)
        self._parameters = target_parameters if isinstance(target_parameters, (list, tuple, set)) else ()

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> LayerRanks:
        """Get the ranks of a saved adapter."""
        return cls(config.get("rank_pattern"), config.get("target_parameters"))

    def of(self, layer: str) -> int | None:
        """Get the pattern's r for a layer, or None; `AdapterError` for hostile patterns."""
        pattern = self.pattern_of(parameter_of(layer, self._parameters) or layer)
        return None if pattern is None else self._ranks[pattern]

    def pattern_of(self, layer: str) -> str | None:
        """Get the first pattern that names a layer."""
        return self._patterns.first(layer)


def saved_method(
    config: Mapping[str, Any], layer: str, ranks: LayerRanks | None = None, shape: tuple[int, int] | None = None
) -> Method:
    """Get the method of one layer from the config of a saved adapter; `AdapterError` for a newer format.

    Give the config's `ranks` for many layers. With the shape (O, I) of the layer's weight the method
    is fitted to it, as where it was trained.
    """
    refuse_newer(config.get("format_version", FORMAT_VERSION))
    name = str(config.get("method"))
    if name not in METHODS:
        raise OptionError(f"adapter_config.json: unknown method {name!r}. {nearest(name, list(METHODS))}")
    given = {option: config[option] for option in METHODS[name].options() if config.get(option) is not None}
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in given.items()}
    r = (ranks or LayerRanks.of_config(config)).of(layer)
    refuse_absurd(options if r is None else {**options, "r": r})
    try:
        method = build_method(name, options)
        method = method if r is None else method.sized(r)
        return method if shape is None or r is not None else method.fitted(*shape, layer)
    except TypeError as error:  # text or a list instead of a number
        raise OptionError(f"adapter_config.json: an option of {name} has the wrong type: {error}.") from error


def saved_modules(folder: AdapterFolder, base: Checkpoint) -> Iterator[tuple[str, str, bool, SpectralModule]]:
    """Get (layer, name of its base tensor, whether it is stored in x out, module) for every adapted layer.

    The basis is computed from the base's weight and rotated to match the saved sketch: `AdapterError` for a base that
    is not the adapter's. One base weight is in memory at a time.
    """
    owners = Owners()
    ranks, layouts = LayerRanks.of_config(folder.config), StoredLayouts(base)
    for layer, names in owner_first(folder):
        tensor_name = base_tensor(layer, base)
        tensors = {name: folder.tensor(key) for name, key in names.items()}
        module, transposed = _fit(folder.config, ranks, layer, base.tensor(tensor_name), tensors, owners, layouts)
        owners.add(module)
        yield layer, tensor_name, transposed, module


def tensors_by_layer(folder: AdapterFolder) -> dict[str, dict[str, str]]:
    """Get layer -> {tensor of its module: key in the file}."""
    found: dict[str, dict[str, str]] = {}
    for key in folder.names:
        layer, middle, name = key.removeprefix(PEFT_PREFIX).rpartition(f".{ADAPTERS_ATTRIBUTE}.")
        if middle:
            found.setdefault(layer, {})[name] = key
    return found


def owner_first(folder: AdapterFolder) -> list[tuple[str, dict[str, str]]]:
    """Get `tensors_by_layer` by name, but first the layers with numbers that others share."""
    layers = sorted(tensors_by_layer(folder).items())
    # Their names do not depend on a weight's shape.
    shared = saved_method(folder.config, "", LayerRanks({})).shared_shapes(1, 1) if layers else {}
    return sorted(layers, key=lambda item: not any(name in item[1] for name in shared))


def _fit(
    config: Mapping[str, Any],
    ranks: LayerRanks,
    layer: str,
    stored: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    owners: Owners,
    layouts: StoredLayouts,
) -> tuple[SpectralModule, bool]:
    """Get the module with its saved numbers, and whether the weight is transposed.

    A checkpoint does not show whether a matrix is stored in x out (transformers' Conv1D). The shapes of the trained
    tensors do, else the sketch, and where a method has no directions to keep a sketch of, the model's class.
    """
    refused: AdapterError | None = None
    if stored.ndim < 2 or not stored.is_floating_point():
        raise AdapterError(
            f"{layer}: an adapter cannot be on this {stored.ndim}-dimensional tensor of "
            f"{str(stored.dtype).removeprefix('torch.')} in the base. Check the base."
        )
    fits = []
    for transposed in (False, True) if stored.ndim == 2 else (False,):
        W_OI = stored.T if transposed else stored.flatten(1)
        method = saved_method(config, layer, ranks, (W_OI.shape[0], W_OI.shape[1]))
        if _shapes_fit(method, W_OI, tensors):
            fits.append((transposed, method, W_OI))
    if len(fits) == 2 and fits[0][1].basis(*fits[0][2].shape)[0] == 0:
        fits = [fits[layouts.in_x_out(layer)]]
    for transposed, method, W_OI in fits:
        try:
            return _module(config, method, Weight(layer, W_OI), tensors, owners), transposed
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
    owners: Owners,
) -> SpectralModule:
    rows_O, cols_I = weight.W_OI.shape
    rank, columns = method.basis(rows_O, cols_I)
    embedded, owner = "U_OR" in tensors, owners.of(method, weight.name, rows_O, cols_I)
    refuse_misfits(method, weight.name, (rows_O, cols_I), tensors, owner)
    if rank == 0 or embedded:
        source = str(config.get("directions", "weight"))
        spectrum = Spectrum.unknown(rows_O, cols_I, rank, weight.name, source)
    else:
        (spectrum,) = obtain([weight], Request(rank, columns, **saved_svd(config)), open_cache())
    module = SpectralModule(method, spectrum, embed_basis=embedded, owner=owner)
    module.base_matrix = lambda: weight.W_OI
    fill_module(module, tensors)
    module.base_matrix = None
    return module


def refuse_misfits(
    method: Method,
    layer: str,
    shape: tuple[int, int],
    tensors: Mapping[str, torch.Tensor],
    owner: SpectralModule | None,
) -> None:
    """Raise `AdapterError` if a tensor of a layer is missing, has another shape, or contains NaN or infinity.

    Call it before anything is allocated: then the file has bytes for every allocation, whatever the config says.
    """
    rank, _ = method.basis(*shape)
    expected = method.trained_shapes(*shape) | (method.shared_shapes(*shape) if owner is None else {})
    if rank and "U_OR" in tensors:
        expected |= {"U_OR": (shape[0], rank), "S_R": (rank,), "Vh_RI": (rank, shape[1])}
    for name, sides in expected.items():
        if name not in tensors:
            raise AdapterError(f"{layer}: the adapter file has no tensor {name!r}: it is incomplete. Copy it again.")
        if tuple(tensors[name].shape) != sides:
            found = "x".join(map(str, tensors[name].shape)) or "a single number"
            raise AdapterError(
                f"{layer}: the tensor {name!r} is {found}, but the config needs {'x'.join(map(str, sides))}. "
                f"Copy the adapter again."
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{layer}: the tensor {name!r} contains NaN or infinity. Train or copy the adapter again."
            )


def fill_module(module: SpectralModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors of a file into a module; `AdapterError` if one is missing, surplus or out of range."""
    missing = [name for name in module.state_dict() if name not in tensors]
    if missing:
        raise AdapterError(
            f"{module.name}: the adapter file has no tensor {missing[0]!r}: it is incomplete. Copy it again."
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise AdapterError(f"{module.name}: the saved numbers do not fit: {one_line(error)}. Copy it again.") from error


def saved_svd(config: Mapping[str, Any]) -> dict[str, Any]:
    """Get the config's options of the basis, checked."""
    found = config.get("svd") or {}
    if not isinstance(found, dict):
        raise AdapterError(f"adapter_config.json: svd={found!r} is not a map of options. Copy the adapter again.")
    kinds: dict[str, Any] = {"solver": str, "tolerance": (int, float), "seed": int}
    options = {name: found[name] for name in kinds if name in found}
    for name, value in options.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise AdapterError(f"adapter_config.json: svd.{name}={value!r} has the wrong type. Copy the adapter again.")
    refuse_absurd(options)
    return options

"""Limits for the config of a file: its patterns are matched in bounded time, and its sizes must fit the file.

PEFT gives such patterns to `re`, which cannot be stopped, so it gets to see the names that they choose instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter import ADAPTERS_ATTRIBUTE, group_of
from ..adapter.saved import LayerRanks
from ..checkpoint import PEFT_PREFIX, read_adapter_folder
from ..checkpoint.patterns import COUNTED, INSIDE, WHOLE, Clock, Expression, is_tame, split_names
from ..errors import AdapterError, WeightError
from ..records import Weight
from .base_weight import backend_of, layout_of
from .config import SpectralConfig

# PEFT's default layers_pattern.
ANY_COUNTED = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@contextmanager
def out_of_peft_s_sight(
    config: SpectralConfig, model: nn.Module, parameters: Iterable[str] = ()
) -> Iterator[frozenset[str]]:
    """Get the layers that a config chooses, and keep its patterns from PEFT for the time of the block.

    `parameters` are the paths of those that it chooses besides.

    PEFT matches `target_modules` once more when it saves, so one that may take `re` for ever stays a set of names.
    `AdapterError` for patterns that choose nothing, are none, or take too long.
    """
    kept: dict[str, Any] = {"exclude_modules": config.exclude_modules, "rank_pattern": config.rank_pattern}
    chosen = chosen_layers(config, model)
    parameters = list(parameters)
    if not chosen and not parameters:
        raise AdapterError(
            f"target_modules: {str(config.target_modules)[:200]!r} matches no layer of {type(model).__name__} (after "
            f"exclusions). Load the adapter on the base model that it was trained on."
        )
    if isinstance(config.target_modules, str):
        if is_tame(config.target_modules, max(len(path) for path, _ in model.named_modules())):
            kept["target_modules"] = config.target_modules
        config.target_modules = set(chosen)
    ranks = LayerRanks(config.rank_pattern, config.target_parameters)
    given = {layer: r for layer in sorted(chosen) + parameters if (r := ranks.of(layer)) is not None}
    config.exclude_modules, config.rank_pattern = None, {f"^{re.escape(layer)}": r for layer, r in given.items()}
    try:
        yield chosen
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def chosen_layers(config: PeftConfig, model: nn.Module) -> frozenset[str]:
    """Get the paths of the modules that a config targets, as PEFT's check_target_module_exists chooses them."""
    clock = Clock()
    targeted, excluded = (
        LayerNames(getattr(config, name, None), clock) for name in ("target_modules", "exclude_modules")
    )
    saved = [Expression(name, INSIDE, clock) for name in getattr(config, "modules_to_save", None) or ()]
    counted = LayerIndices(config, clock)
    # A second adapter meets the layers that the first has adapted; their insides are not targets.
    paths = [
        path for path, _ in model.named_modules() if path and ".base_layer" not in path and ".spectune_" not in path
    ]
    return frozenset(
        path
        for path in paths
        if targeted.hold(path)
        and counted.holds(path)
        and not excluded.hold(path)
        and not any(name.match(path) for name in saved)
    )


class LayerNames:
    """Names of modules, or a pattern for whole paths."""

    def __init__(self, words: Any, clock: Clock) -> None:
        rest, self.paths, self.ends = "", frozenset[str](), frozenset(() if isinstance(words, str) else words or ())
        if isinstance(words, str):
            rest, self.paths, self.ends = split_names(words)
        self.pattern = Expression(rest, WHOLE, clock) if rest else None

    def hold(self, path: str) -> bool:
        starts = (0, *(dot.end() for dot in re.finditer(r"\.", path)))
        if path in self.paths or any(path[start:] in self.ends for start in starts):
            return True
        return self.pattern is not None and self.pattern.match(path, whole=True) is not None


class LayerIndices:
    """layers_to_transform, with layers_pattern."""

    def __init__(self, config: PeftConfig, clock: Clock) -> None:
        asked, words = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
        indices = [asked] if isinstance(asked, int) else asked
        # What is not a number is not an index, and a file may hold anything.
        self.indices = {index for index in indices if isinstance(index, (int, float))} if indices else None
        self.patterns = [
            Expression(w, COUNTED, clock) for w in ([words] if isinstance(words, str) else words or ()) if w
        ]

    def holds(self, path: str) -> bool:
        if self.indices is None:
            return True
        found = (pattern.match(path) for pattern in self.patterns) if self.patterns else [ANY_COUNTED.match(path)]
        match = next((match for match in found if match is not None), None)
        return match is not None and match["idx"] is not None and int(match["idx"]) in self.indices


def refuse_unbacked(config: SpectralConfig, model: nn.Module, chosen: frozenset[str], experts: list[Weight]) -> None:
    """Raise `AdapterError` if the file lacks tensors that its config would make; once, before anything is made.

    `experts` are the matrices of chosen parameters. A layer may stand under another path in the file
    (transformers renames some), so what is not there by name may be any tensor of that name and shape that no other
    layer has claimed.
    """
    origin = config.origin
    if origin is None or origin.folder is None:
        return
    read = read_adapter_folder(origin.folder)
    read.refuse_surplus(sum(1 for _ in model.modules()) + len(experts), type(model).__name__)
    saved = {name.removeprefix(PEFT_PREFIX): shape for name, shape in read.file.shapes.items()}
    left = Counter((key.rpartition(".")[2], shape) for key, shape in saved.items() if f".{ADAPTERS_ATTRIBUTE}." in key)
    made = list(
        _made(
            config,
            [
                *_shapes(chosen, model),
                *((expert.name, (expert.W_OI.shape[0], expert.W_OI.shape[1])) for expert in experts),
            ],
        )
    )
    by_name = {made_ for made_ in made if saved.get(f"{made_[0]}.{ADAPTERS_ATTRIBUTE}.{made_[1]}") == made_[2]}
    for layer, name, shape in (*by_name, *(other for other in made if other not in by_name)):
        left[name, shape] -= 1
        if left[name, shape] < 0:
            raise _unbacked(saved, layer, name, shape)
    config.origin = replace(origin, folder=None)


def _made(
    config: SpectralConfig, layers: list[tuple[str, tuple[int, int]]]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Get (layer, tensor, shape) for what the tuner would allocate only because of the config."""
    ranks = LayerRanks(config.rank_pattern, config.target_parameters)
    groups: set[str] = set()
    """Those whose shared numbers were made."""
    for layer, (rows_O, cols_I) in layers:
        try:
            method = config.method_for(layer, ranks.of(layer), rows_O, cols_I)
            rank, _ = method.basis(rows_O, cols_I)
            shapes = dict(method.trained_shapes(rows_O, cols_I))
        except WeightError:
            continue  # raised again, with the layer's name, when the layer is adapted
        if (group := group_of(method, layer)) not in groups:
            shapes |= method.shared_shapes(rows_O, cols_I)
            groups.add(group)
        if rank and (config.save_basis == "always" or (config.directions != "weight" and config.basis_is_in_file)):
            shapes |= {"U_OR": (rows_O, rank), "S_R": (rank,), "Vh_RI": (rank, cols_I)}
        for name, shape in shapes.items():
            yield layer, name, shape


def _shapes(chosen: frozenset[str], model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in sorted(chosen):
        module = model.get_submodule(path)
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        yield from _shape(path, layer)
        if isinstance(layer, nn.MultiheadAttention):
            out: Any = layer.out_proj
            yield from _shape(f"{path}.out_proj", out.get_base_layer() if isinstance(out, BaseTunerLayer) else out)


def _shape(path: str, layer: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    backend = backend_of(layer)
    try:
        layout = layout_of(layer, path, backend)
    except WeightError:
        return  # raised again when the layer is adapted
    if backend is not None:
        yield path, (layer.out_features, layer.in_features)
    elif (stored := getattr(layer, layout.attribute)).ndim >= 2:  # else partitioned, which is refused later
        rows_O, cols_I = layout.to_matrix(stored).shape
        yield path, (rows_O, cols_I)


def _unbacked(saved: dict[str, tuple[int, ...]], layer: str, name: str, shape: tuple[int, ...]) -> AdapterError:
    key = f"{layer}.{ADAPTERS_ATTRIBUTE}.{name}"
    if key not in saved:
        return AdapterError(
            f"{layer}: the adapter file has no tensor {key!r}: it is incomplete, or it was not written for this model "
            f"and method. Export or copy the adapter again."
        )
    wanted, found = ("x".join(map(str, sides)) or "one number" for sides in (shape, saved[key]))
    return AdapterError(
        f"{layer}: the adapter file does not fit: {name!r} is {found}, but its config needs {wanted}. Load it on the "
        f"base that it was trained on, or copy it again; to train anew, make a new SpectralConfig."
    )

"""A saved adapter of one of PEFT's own methods, from anybody: its config is checked before PEFT obeys it.

PEFT gives the patterns of a config to Python's `re`, which cannot be stopped, and allocates what the config asks for.
So the layers are chosen here, in bounded time, and PEFT is given their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from ..checkpoint import AdapterFolder, read_adapter_folder
from ..checkpoint.patterns import Clock, LayerPatterns
from ..errors import AdapterError, SpectuneError, one_line
from .config_types import NAMES
from .from_file import chosen_layers

# PEFT's own names for every kind of target.
EVERY_LINEAR = "all-linear"
NAME = re.compile(r"[\w.\-]{1,500}")
# Patterns that PEFT matches with `re`; in every honest file they are names of modules.
NAME_LISTS = ("modules_to_save", "target_parameters", "target_modules_bd_a", "target_modules_bd_b")
PATTERN_MAPS = ("rank_pattern", "alpha_pattern")
TYPES: dict[str, tuple[type, ...]] = {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "layers_to_transform": (int, list, tuple, type(None)),
    **dict.fromkeys(NAME_LISTS, (list, tuple, set, type(None))),
    **dict.fromkeys(PATTERN_MAPS, (dict, type(None))),
}
# Initialisations that count as the config says: "pissa_niter_16", LoftQ's alternations. PEFT's examples take 16 and 5.
ITERATIONS = re.compile(r"_niter_(\d+)$")
MOST_ITERATIONS = 100
# Layers after replication; the largest published models have 126.
MOST_LAYERS = 2_000


def bounded_config(folder: str | Path, model: nn.Module) -> PeftConfig:
    """Get the config of a saved adapter of any PEFT method, as PEFT may obey it on this model.

    Same layers, ranks and alphas as PEFT would choose; `AdapterError` for patterns that take too long, wrong types, and
    for ranks, repeats and counts that the file does not back.
    """
    read = read_adapter_folder(folder)
    read.refuse_surplus(sum(1 for _ in model.modules()), type(model).__name__)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except SpectuneError:
        raise
    except Exception as error:  # PEFT's configs check few of their fields and can raise anything
        raise AdapterError(f"{folder}: PEFT cannot read this config: {one_line(error)}. Copy it again.") from error
    if read.peft_type != "SPECTUNE":  # whose tuner checks its configs itself
        _check_types(read.path, config)
        _check_counts(read, config)
        _choose_layers(config, model)
    return config  # type: ignore[no-any-return]


def _check_types(path: Path, config: Any) -> None:
    for option, kinds in TYPES.items():
        value = getattr(config, option, None)
        if not isinstance(value, kinds):
            raise _refused(path, option, value)
        words: Any = () if value is None or isinstance(value, (str, int, dict)) else value
        if option != "layers_to_transform" and not all(isinstance(word, str) for word in words):
            raise _refused(path, option, value)
        if option in NAME_LISTS and not all(NAME.fullmatch(word) for word in words):
            raise _refused(path, option, value)
        if isinstance(value, dict) and not all(_is_count(count) for count in value.values()) and not _is_kept(value):
            raise _refused(path, option, value)


def _check_counts(read: AdapterFolder, config: Any) -> None:
    """Refuse numbers that PEFT would count, allocate or repeat by."""
    held = max((max(shape, default=0) for name, shape in read.shapes.items() if ".lora_" in name), default=None)
    given = (getattr(config, "rank_pattern", None) or {}).values()
    ranks = [getattr(config, "r", None), *(sum(kept) if isinstance(kept, list) else kept for kept in given)]
    if held is not None and any(not _is_count(r) or r > held for r in ranks if r is not None):
        raise _refused(read.path, "r", ranks[0] if len(ranks) == 1 else ranks)
    start = str(getattr(config, "init_lora_weights", ""))
    counted = ITERATIONS.search(start[:200])
    if len(start) > 200 or (counted and int(counted[1]) > MOST_ITERATIONS):
        raise _refused(read.path, "init_lora_weights", start)
    loftq: Any = getattr(config, "loftq_config", None) or {}
    iterations = loftq.get("loftq_iter", 1) if isinstance(loftq, dict) else getattr(loftq, "loftq_iter", 1)
    if not _is_count(iterations) or iterations > MOST_ITERATIONS:
        raise _refused(read.path, "loftq_config", loftq)
    repeats: Any = getattr(config, "layer_replication", None) or ()
    if not _are_repeats(repeats):
        raise _refused(read.path, "layer_replication", repeats)


def _are_repeats(repeats: Any) -> bool:
    if not isinstance(repeats, (list, tuple)) or len(repeats) > MOST_LAYERS:
        return False
    whole = all(isinstance(r, (list, tuple)) and len(r) == 2 and all(type(n) is int for n in r) for r in repeats)
    return whole and sum(abs(stop - start) for start, stop in repeats) <= MOST_LAYERS


def _choose_layers(config: Any, model: nn.Module) -> None:
    words = getattr(config, "target_modules", None)
    if words is None or (isinstance(words, str) and words.lower() == EVERY_LINEAR):
        chosen = frozenset(path for path, _ in model.named_modules() if path)
        if getattr(config, "exclude_modules", None) is not None:
            raise AdapterError(
                f"exclude_modules={config.exclude_modules!r} with target_modules={words!r} is not allowed in a file. "
                f"Write the names of the layers into target_modules."
            )
    else:
        chosen = chosen_layers(config, model)
        if not chosen and not _parameters(config, model):
            raise AdapterError(
                f"target_modules: {str(words)[:200]!r} matches no layer of {type(model).__name__} (after exclusions). "
                f"Load the adapter on the base model that it was trained on."
            )
        config.target_modules = "|".join(re.escape(layer) for layer in sorted(chosen)) or []
    chosen |= _parameters(config, model)
    clock = Clock()
    for option in PATTERN_MAPS:
        if (given := getattr(config, option, None)) and not _is_kept(given):
            patterns = LayerPatterns(given, clock)
            named = ((layer, patterns.first(layer)) for layer in sorted(chosen))
            setattr(config, option, {f"^{re.escape(layer)}": given[word] for layer, word in named if word is not None})
    for option in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, option):
            setattr(config, option, None)


def _parameters(config: Any, model: nn.Module) -> frozenset[str]:
    """Get the paths of the parameters that `target_parameters` names: whole paths, or ends of them."""
    ends = tuple(getattr(config, "target_parameters", None) or ())
    return frozenset(
        path for path, _ in model.named_parameters() if any(f".{path}".endswith(f".{end}") for end in ends)
    )


def _is_kept(pattern: dict[str, Any]) -> bool:
    """Ask whether this is AdaLoRA's rank_pattern: names of tensors, and for each which of its ranks were kept.

    PEFT looks these names up and matches nothing by them.
    """
    return all(
        NAME.fullmatch(name) and isinstance(kept, list) and all(isinstance(one, bool) for one in kept)
        for name, kept in pattern.items()
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _refused(path: Path, option: str, value: Any) -> AdapterError:
    return AdapterError(
        f"{path}: {option}={str(value)[:200]!r} is not a plausible value for this adapter. Copy it again."
    )

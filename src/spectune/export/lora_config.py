"""The adapter_config.json of an exported LoRA: every layer's scaling alpha / r is exactly 1."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..checkpoint.patterns import rank_pattern
from ..errors import ExportError
from .layers import base_path, base_paths, inner_model

# Fields that mean the same in the config of the spectral adapter and of the LoRA.
SHARED_FIELDS = ("task_type", "base_model_name_or_path", "revision", "modules_to_save", "trainable_token_indices")


def lora_config(
    model: nn.Module,
    adapter_name: str,
    ranks: Mapping[str, int],
    fan_in_fan_out: bool,
    base: str | None = None,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """Get the config with which PEFT puts factors of these ranks (layer -> rank) on exactly these layers.

    `r` is the most common rank, the others are in `rank_pattern`; alpha equals the rank everywhere.
    `base` is the name or folder of the base model, in case the adapter's own config does not name it; `parameters` are
    the names in `ranks` that stand for stored stacks of experts.
    """
    if parameters and fan_in_fan_out:
        raise ExportError(
            f"{min(parameters)}: a LoRA cannot hold experts and Conv1D layers together. Merge the adapter instead."
        )
    modules = [layer for layer in ranks if layer not in parameters]
    ours = adapter_config(model, adapter_name)
    shared = {name: _plain(getattr(ours, name, None)) for name in SHARED_FIELDS}
    inner = inner_model(model)
    name = shared["base_model_name_or_path"] or base or getattr(inner, "name_or_path", None)
    r, pattern = rank_pattern(ranks)
    return {
        "peft_type": "LORA",
        **shared,
        "ensure_weight_tying": bool(getattr(ours, "ensure_weight_tying", False)),
        "base_model_name_or_path": name or None,
        "auto_mapping": None if shared["task_type"] else _class_of(inner),
        "target_modules": target_modules(modules, base_paths(model), shared["modules_to_save"] or []),
        **({"target_parameters": target_parameters(model, parameters)} if parameters else {}),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """Get the PEFT config of an adapter in a live model, or None if the model has none."""
    return (getattr(model, "peft_config", None) or {}).get(adapter_name)


def refuse_trained_biases(model: nn.Module, adapter_name: str) -> None:
    """Raise `ExportError` when the adapter trains biases, which belong to the base and not to a LoRA."""
    bias = getattr(adapter_config(model, adapter_name), "bias", "none")
    if bias != "none":
        raise ExportError(
            f"adapter {adapter_name!r}: bias={bias!r} trains biases, which are not part of an exact LoRA. Train with "
            "bias='none', or merge the adapter instead."
        )


def target_modules(adapted: list[str], all_paths: Iterable[str], modules_to_save: list[str]) -> list[str] | str:
    """Get the shortest target_modules by which PEFT finds the adapted layers and no other module.

    The last parts of the names if they suffice, then whole names, then a regex.
    """
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in modules_to_save]
    paths = {path for path in all_paths if not any(pattern.match(path) for pattern in saved)}
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    for targets in (leaves, sorted(adapted)):
        ends = tuple("." + target for target in targets)
        if {path for path in paths if path in targets or path.endswith(ends)} == set(adapted):
            return targets
    return "|".join(re.escape(name) for name in sorted(adapted))


def target_parameters(model: nn.Module, adapted: Collection[str]) -> list[str]:
    """Get the ends of paths by which PEFT finds these parameters and no other: two parts of each, or whole paths."""
    paths = [base_path(model, path) for path, _ in model.named_parameters() if ".spectune_adapter" not in path]
    ends = {".".join(path.split(".")[-2:]) for path in adapted}
    return sorted(ends if {p for p in paths if p.endswith(tuple(f".{e}" for e in ends))} == set(adapted) else adapted)


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, (set, tuple, list)) else value


def _class_of(inner: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__}

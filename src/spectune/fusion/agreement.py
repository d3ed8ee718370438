"""What a fused adapter's folder takes over from those of the adapters: settings and modules on which they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoint import Base
from ..errors import AdapterError
from .adapters import Adapter
from .experts import expert_parameters
from .layers import Layers

# The fields by which an adapter finds its layers, the same words in PEFT's LoRA and in ours.
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
# The fields that say what is trained in full beside the updates.
CARRIED = ("modules_to_save", "trainable_token_indices")
# Task types for which PEFT adds the head to modules_to_save by itself.
WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def common_config(adapters: Sequence[Adapter], layers: Layers, base: Base | None) -> dict[str, Any]:
    """Get what the result's config takes from those of the adapters."""
    configs = [adapter.folder.config for adapter in adapters]
    named = next((adapter.base_name for adapter in adapters if adapter.base_name), None)
    common: dict[str, Any] = {"base_model_name_or_path": named or (base.name if base is not None else None)}
    for key in ("task_type", "auto_mapping", "revision", *CARRIED, "inference_mode", "format_version"):
        values = [config.get(key) for config in configs]
        common[key] = values[0] if all(value == values[0] for value in values) else None
    common["ensure_weight_tying"] = all(config.get("ensure_weight_tying") for config in configs)
    common["target_parameters"] = expert_parameters(adapters) or None
    targets = [{key: _in_order(config.get(key)) for key in TARGETS} for config in configs]
    if layers.everywhere and all(target == targets[0] for target in targets):
        common |= targets[0]
    return common


def _in_order(names: Any) -> Any:
    """Get a list of names sorted: PEFT saves sets, in an order of their own each time."""
    return sorted(names, key=str) if isinstance(names, list) else names


def common_carried(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Get the modules trained in full; `AdapterError` if they are not equal in all adapters."""
    carried = [adapter.carried for adapter in adapters]
    for adapter, tensors in zip(adapters[1:], carried[1:], strict=True):
        different = [
            name
            for name in sorted(carried[0].keys() | tensors.keys())
            if name not in tensors or name not in carried[0] or not torch.equal(tensors[name], carried[0][name])
        ]
        if different:
            raise AdapterError(
                f"{different[0]}: trained in full, but not the same in {adapters[0].name} and {adapter.name}; no rule "
                "fuses whole modules. Leave them out with heads_apart (--heads-apart), or train all adapters with the "
                "same ones."
            )
    return carried[0]


def without_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Get what changes in the config of an adapter without heads: PEFT expects one in the file for these tasks."""
    task = config["task_type"]
    return {**dict.fromkeys(CARRIED), "ensure_weight_tying": False, "task_type": None if task in WITH_HEADS else task}

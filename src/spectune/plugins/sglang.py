"""The SGLang plugin: where SGLang reads the config of a LoRA, a Spectune folder becomes the exact LoRA that it is.

SGLang has no resolver of adapters, but hooks on any of its functions (sglang/srt/plugins, 0.5.23). `LoRAConfig` is what
reads a path, of `--lora-paths NAME=FOLDER` and of `/load_lora_adapter`, and the weights are read from its path.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..export.readers import SGLANG
from . import served as cached

DROP = "SPECTUNE_SGLANG_DROP"
log = logging.getLogger("sglang.plugins.spectune")


def lead_to_lora(config: Any, path: str | None = None, *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """Get the arguments of `LoRAConfig` with the path of the LoRA; None leaves them. `ExportError` if refused."""
    if path is None or not cached.is_spectune(place := Path(path).expanduser(), log):
        return None
    return (config, str(cached.served(place, None, SGLANG, log, DROP).path), *args), kwargs


def register() -> None:
    """Hook the config's constructor; SGLang applies it after all plugins are loaded, in each process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.lora.lora_config.LoRAConfig.__init__", lead_to_lora, HookType.BEFORE)

"""The axolotl plugin: `plugins: [spectune.plugins.axolotl.SpectunePlugin]`, then `adapter: spectral_a` in its YAML.

Only axolotl imports this file. Its block `spectune:` has the options of the adapter.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel, Field

from ..errors import OptionError
from ..methods import METHODS
from ..tuner import attach, load_attached
from .options import config_of

# Options of axolotl's LoRA whose meaning would be another one here, or none.
OF_LORA = ("lora_r", "lora_alpha", "peft_use_dora", "peft_use_rslora", "loraplus_lr_ratio", "peft_init_lora_weights")


class SpectuneArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    spectune: dict[str, Any] = Field(default_factory=dict, description="Options of the adapter, as in SpectralConfig.")


class SpectunePlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Makes every method of spectune an `adapter:` of axolotl, with targets from its `lora_target_…` keys."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SpectuneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        return [AdapterCapabilities(name=method, lora_like=False) for method in METHODS]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Get the adapted model and its config; None for an adapter that is not ours."""
        if cfg.adapter not in METHODS:
            return None
        given = [option for option in OF_LORA if cfg.get(option)]
        if given:
            raise OptionError(f"{given[0]} is for a LoRA, and adapter is {cfg.adapter}. Use the block `spectune:`.")
        targets = "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules
        whole = cfg.lora_modules_to_save
        known = {"target_modules": targets or None, "modules_to_save": whole or None, "task_type": "CAUSAL_LM"}
        config = config_of(cfg.adapter, cfg.spectune or {}, **known)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            tuned = load_attached(model, cfg.lora_model_dir, is_trainable=not inference)
            config = tuned.peft_config[tuned.active_adapter]
        else:
            tuned = attach(model, config)
        tuned.print_trainable_parameters()
        return tuned, config

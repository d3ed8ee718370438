"""Makes PEFT know the method: config and tuner in its tables."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import SpectralConfig
from .model import SpectralTuner
from .peft_type import METHOD, PEFT_TYPE


def register() -> None:
    """Enter config and tuner into PEFT's tables; a second call does nothing."""
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=SpectralConfig, model_cls=SpectralTuner)

"""Registers the method with PEFT: config and tuner in its tables."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import SpectralConfig
from .model import SpectralTuner
from .origin import Origin, came_with_a_file
from .peft_type import METHOD, PEFT_TYPE


class _Reader(type):
    """Makes a `SpectralConfig` that is marked as read, and takes every `SpectralConfig` for its own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> SpectralConfig:
        config = SpectralConfig(*args, **kwargs)
        came_with_a_file(config, Origin())
        return config

    def __instancecheck__(cls, config: object) -> bool:
        return isinstance(config, SpectralConfig)


class SpectralConfigFromFile(SpectralConfig, metaclass=_Reader):
    """What PEFT's table has for a config: PEFT and transformers call it with what they have read, and nobody else does.

    They read a file through the base class (`PeftConfig.from_pretrained`), so this is the only place that sees it.
    """


SpectralConfigFromFile.__name__ = SpectralConfig.__name__  # as warnings call it


def register() -> None:
    """Enter config and tuner into PEFT's tables; a second call does nothing."""
    if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING.pop(PEFT_TYPE, None)  # the entry that has waited for this
        register_peft_method(name=METHOD, config_cls=SpectralConfigFromFile, model_cls=SpectralTuner)

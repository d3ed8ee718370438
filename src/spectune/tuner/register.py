"""Makes PEFT know the method. What PEFT hard-codes per method is met here and nowhere else."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

# "spectral_" occurs in base models (spectral_norm layers), "spectune_" does not, and PEFT finds an
# adapter's tensors by this prefix.
METHOD = "spectune"


def extend_peft_type() -> PeftType:
    """Get the PeftType member of this method, adding it to PEFT's closed enum if need be."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]


PEFT_TYPE = extend_peft_type()


def register() -> None:
    """Enter config and tuner into PEFT's tables; a second call does nothing."""
    from .config import SpectralConfig
    from .model import SpectralTuner

    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=SpectralConfig, model_cls=SpectralTuner)

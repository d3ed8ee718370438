"""PEFT's name of the method: a new member of its closed enum."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

from _spectune_autoload import METHOD as METHOD
from _spectune_autoload import extend

# "spectral_" occurs in base models (spectral_norm layers), "spectune_" does not, and PEFT finds an
# adapter's tensors by this prefix.
PEFT_TYPE: PeftType = extend(PeftType)

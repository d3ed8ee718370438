"""`build_adapter_config`: the configuration of any PEFT method out of plain options, as a YAML file holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.config import PeftConfig

from ..errors import OptionError, SpectuneError, UnknownOptionError, nearest
from .config import SpectralConfig


def build_adapter_config(options: Mapping[str, Any]) -> PeftConfig:
    """Get a `SpectralConfig` where the options name a `method`, PEFT's own config where they name a `peft_type`.

    Every option reaches the config or is refused: `UnknownOptionError` with the near misses, `OptionError` for a
    wrong value.
    """
    given = dict(options)
    if ("method" in given) == ("peft_type" in given):
        raise OptionError(
            f"adapter: asked for {given or 'nothing'}. Name one of them: 'method' (one of spectune's) or 'peft_type' "
            f"(one of PEFT's, such as LORA)."
        )
    if "method" in given:
        return SpectralConfig(**given)
    asked = str(given.pop("peft_type")).upper()
    known = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if asked not in known:
        raise OptionError(f"adapter: peft_type {asked!r} does not exist. {nearest(asked, list(known))}")
    return _foreign(known[asked], asked, given)


def _foreign(kind: type[PeftConfig], name: str, given: dict[str, Any]) -> PeftConfig:
    fields = [field for field in inspect.signature(kind).parameters if field != "peft_type"]
    for option in given:
        if option not in fields:
            raise UnknownOptionError(f"adapter: {name} has no option {option!r}. {nearest(option, fields)}")
    try:
        return kind(**given)
    except SpectuneError:
        raise
    except (ValueError, TypeError) as error:
        raise OptionError(f"adapter: {name} refuses these options: {error}") from error

"""`build_adapter_config`: the configuration of any PEFT method from plain options, as in a YAML file."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.config import PeftConfig

from ..errors import OptionError, SpectuneError, UnknownOptionError, nearest
from .config import SpectralConfig
from .config_types import fits

# Options of LoRA that have no effect in PEFT, or fail, until something else is called: the first three compute a start
# from activations or gradients. Without that call, LoRA would silently start from random numbers.
NEEDS_A_CALL = {
    "eva_config": "initialize_lora_eva_weights",
    "corda_config": "preprocess_corda",
    "lora_ga_config": "preprocess_loraga",
    "arrow_config": "create_arrow_model",
}


def build_adapter_config(options: Mapping[str, Any]) -> PeftConfig:
    """Get a `SpectralConfig` if the options have a `method`, PEFT's own config if they have a `peft_type`.

    Every option reaches the config or is refused: `UnknownOptionError` with the near misses, `OptionError` for a
    wrong value.
    """
    given = dict(options)
    if ("method" in given) == ("peft_type" in given):
        raise OptionError(
            f"adapter: give either 'method' (one of spectune's) or 'peft_type' (one of PEFT's, such as LORA), not "
            f"{given or 'neither'}."
        )
    if "base_model_name_or_path" in given:
        raise OptionError("adapter: base_model_name_or_path comes from the model itself. Leave it out.")
    if "method" in given:
        return SpectralConfig(**given)
    asked = str(given.pop("peft_type")).upper()
    known = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if asked not in known:
        raise OptionError(f"adapter: peft_type {asked!r} does not exist. {nearest(asked, list(known))}")
    return _foreign(known[asked], asked, given)


def _foreign(kind: type[PeftConfig], name: str, given: dict[str, Any]) -> PeftConfig:
    known = [field for field in inspect.signature(kind).parameters if field != "peft_type"]
    for option in given:
        if option not in known:
            raise UnknownOptionError(f"adapter: {name} has no option {option!r}. {nearest(option, known)}")
    _refuse_wrong_types(kind, name, given)
    start = str(given.get("init_lora_weights")).lower()
    for option, call in NEEDS_A_CALL.items():
        if given.get(option) is not None or f"{start}_config" == option:
            raise OptionError(
                f"adapter: {option.removesuffix('_config')} has no effect without PEFT's {call}, which spectune does "
                f"not call. Leave it out."
            )
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            config = kind(**_nested(kind, given))
    except SpectuneError:
        raise
    except (ValueError, TypeError) as error:
        raise OptionError(f"adapter: {name} refuses these options: {error}") from error
    for warning in warned:
        if "ignored" in str(warning.message):
            raise OptionError(f"adapter: {name}: {' '.join(str(warning.message).split())} Leave it out.")
        warnings.warn_explicit(
            warning.message, warning.category, warning.filename, warning.lineno, module=kind.__module__
        )
    _refuse_overwritten(config, name, given)
    return config


def _refuse_wrong_types(kind: type[PeftConfig], name: str, given: dict[str, Any]) -> None:
    """Raise `OptionError` for a list where a number belongs: PEFT would fail in the middle of a run, or not at all."""
    hints, defaults = get_type_hints(kind), {field.name: field.default for field in fields(kind)}
    for option, value in given.items():
        # Annotated as whole numbers, but only ever divided by.
        hint = float if option.endswith("alpha") and hints.get(option) is int else hints.get(option, Any)
        if not fits(value, hint) and value is not defaults.get(option):
            wanted = inspect.formatannotation(hint).replace("NoneType", "None")
            raise OptionError(
                f"adapter: {name}: {option}={value!r} is of the type {type(value).__name__}, but {wanted} is needed. "
                f"Correct it."
            )


def _refuse_overwritten(config: PeftConfig, name: str, given: dict[str, Any]) -> None:
    """Raise `OptionError` for an option that PEFT replaced by another value or ignored (CPT does)."""
    for option, value in given.items():
        found = getattr(config, option)
        if value is not None and found != value and isinstance(found, (int, float, type(None))):
            raise OptionError(
                f"adapter: {option}={value!r} has no effect: {name} always sets it to {found!r}. Leave it out."
            )


def _nested(kind: type[PeftConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Get the options with PEFT's own class for fields that need one (LoRA's runtime_config), from plain values."""
    hints = get_type_hints(kind)
    return {
        name: hints[name](**value) if isinstance(value, dict) and is_dataclass(hints.get(name)) else value
        for name, value in given.items()
    }

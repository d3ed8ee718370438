"""An adapter's configuration from what a tool passes on: a name, and options as text or as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import OptionError
from ..methods import METHODS
from ..tuner.any_method import build_adapter_config


def config_of(name: str, options: Mapping[str, Any], **unless_given: Any) -> Any:
    """Get the PEFT config of one of our methods, or of PEFT's own by their names; a wrong option is an `OptionError`.

    What the tool itself knows (`unless_given`: the targets, the kind of task) counts where the options do not say it.
    """
    kind = {"method": name} if name in METHODS else {"peft_type": name}
    known = {option: value for option, value in unless_given.items() if value is not None and option not in options}
    return build_adapter_config({**kind, **known, **options})


def value_of(option: str, words: list[str]) -> Any:
    """Get the value of an option of the command line, read as YAML: a number, a name, a list of several, {a: b}."""
    try:
        values = [yaml.safe_load(word) for word in words]
    except yaml.YAMLError as error:
        raise OptionError(f"--{option} {' '.join(words)}: cannot be read as a value. Quote it as YAML.") from error
    return True if not values else values[0] if len(values) == 1 else values

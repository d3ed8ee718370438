"""`pretrained`: the base of a run, and what is said where its head is for other classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..checkpoint import load_auto
from ..errors import OptionError, SpectuneError, one_line
from ..training.config import RunConfig
from ..tuner import keep_unpacked
from .quantization import quantized_loading


def pretrained(
    kind: Any,
    config: RunConfig,
    weights: Path | None,
    heads: Callable[[nn.Module], list[str]] = lambda model: [],
    **options: Any,
) -> Any:
    """Get a pretrained model of transformers' Auto classes; `OptionError` if it cannot be loaded.

    A head (`heads` gets their names) that is for other classes is replaced by a new one, with a warning. Any other
    tensor of another shape is an error: transformers would fill it with random numbers.
    """
    source = weights or config.model
    options |= {} if weights or config.revision is None else {"revision": config.revision}
    quantized = {} if weights or kind is AutoConfig else quantized_loading(config)
    if quantized and getattr(pretrained(AutoConfig, config, None), "quantization_config", None):
        raise OptionError(f"quantization: {source} is stored quantised already. Use quantization: none.")
    if kind is not AutoConfig:
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        found = load_auto(kind, source, dtype=getattr(torch, config.dtype), **options, **quantized)
    except SpectuneError:
        raise
    except (OSError, ValueError) as error:
        raise OptionError(f"model: cannot load {source}: {one_line(error)}.") from error
    if kind is AutoConfig:
        return found
    model, info = found
    others = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    if others:
        _say_replaced(others, heads(model), source)
    keep_unpacked(model)  # also for adapters of PEFT, and before a head is fitted
    return model


def _say_replaced(names: list[str], heads: list[str], source: object) -> None:
    for name in names:
        if not any(name.startswith(f"{head}.") or f".{head}." in name for head in heads):
            raise OptionError(f"model: cannot load {source}: its {name} has another shape than its config says.")
    warnings.warn(f"model: the head of {source} is for other classes; a new one is trained in its place.", stacklevel=2)

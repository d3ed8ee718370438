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
from ..checkpoint.pretrained import TELL_MISFITS, replaced
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
    told = {} if kind is AutoConfig else TELL_MISFITS
    try:
        found = load_auto(kind, source, dtype=getattr(torch, config.dtype), **told, **options, **quantized)
        if kind is AutoConfig:
            return found
        model, info = found
        new = replaced(info, lambda name: any(f".{head}." in f".{name}" for head in heads(model)))
    except SpectuneError:
        raise
    except (OSError, ValueError) as error:
        raise OptionError(f"model: cannot load {source}: {one_line(error)}.") from error
    if new:
        said = f"model: the head of {source} is for other classes; a new one is trained in its place."
        warnings.warn(said, stacklevel=2)
    keep_unpacked(model)  # also for adapters of PEFT, and before a head is fitted
    return model

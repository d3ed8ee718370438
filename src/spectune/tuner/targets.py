"""Layers that a config names and that cannot be adapted: refused before anything is changed."""

from __future__ import annotations

from torch import nn

from ..errors import OptionError, WeightError, nearest
from .config import SpectralConfig


def refuse_output_of_attention(parent: nn.Module, target_name: str, key: str) -> None:
    """Raise `WeightError` for the out_proj of torch's MultiheadAttention, whose forward torch never calls."""
    if isinstance(parent, nn.MultiheadAttention):
        raise WeightError(
            f"{key}: torch's MultiheadAttention reads the weight of its {target_name} and never calls it, so an "
            f"adapter there would do nothing. Target the attention module itself."
        )


def refuse_unmatched_targets(config: SpectralConfig, model: nn.Module) -> None:
    """Raise `OptionError` for a name in target_modules that is the end of no module's path."""
    if not isinstance(config.target_modules, set):
        return
    paths = [name.replace(".base_layer", "") for name, _ in model.named_modules() if ".spectune_" not in name]
    for target in sorted(config.target_modules):
        if not any(path == target or path.endswith("." + target) for path in paths):
            leaves = sorted(
                {path.rpartition(".")[2] for path in paths if path and not path.rpartition(".")[2].isdigit()}
            )
            raise OptionError(
                f"target_modules: no module of {type(model).__name__} is called {target!r}. {nearest(target, leaves)}"
            )

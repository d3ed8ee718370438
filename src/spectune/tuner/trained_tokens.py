"""`refuse_wrong_tokens`: trainable_token_indices that PEFT could not train, said before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import OptionError, nearest

if TYPE_CHECKING:
    from .config import SpectralConfig


def refuse_wrong_tokens(config: SpectralConfig, model: nn.Module) -> None:
    """Raise `OptionError` unless trainable_token_indices lists tokens of embeddings that this model has.

    Which modules a name means is PEFT's rule: those whose path ends with it.
    """
    asked: Any = config.trainable_token_indices
    if asked is None:
        return
    for name, tokens in (asked if isinstance(asked, dict) else {"embed_tokens": asked}).items():
        if not isinstance(name, str) or not name or not _are_tokens(tokens):
            raise OptionError(
                f"trainable_token_indices={asked!r}: must be a list of token numbers, or one for each embedding by its "
                f"name. Correct it."
            )
        for path, module in _named(model, name, not isinstance(asked, dict)).items():
            _refuse_other_module(path, module, tokens)


def _are_tokens(tokens: Any) -> bool:
    numbers = isinstance(tokens, (list, tuple)) and all(type(token) is int and token >= 0 for token in tokens)
    return numbers and len(tokens) > 0


def _named(model: nn.Module, name: str, is_input: bool) -> Mapping[str, nn.Module]:
    known = {path: module for path, module in model.named_modules() if path and ".token_adapter" not in path}
    inputs = getattr(model, "get_input_embeddings", lambda: None)() if is_input else None
    found = {path: m for path, m in known.items() if (m is inputs if inputs is not None else path.endswith(name))}
    if not found:
        leaves = sorted({path.rpartition(".")[2] for path in known})
        raise OptionError(
            f"trainable_token_indices: no module of {type(model).__name__} is called {name!r}. {nearest(name, leaves)}"
        )
    return found


def _refuse_other_module(path: str, module: Any, tokens: Any) -> None:
    if hasattr(module, "token_adapter"):
        module = module.token_adapter.get_base_layer()  # another adapter trains tokens of it, too
    weight = getattr(module, "weight", None)
    if isinstance(module, BaseTunerLayer) or not isinstance(module, (nn.Embedding, nn.Linear)) or weight is None:
        raise OptionError(
            f"trainable_token_indices: {path} is a {type(module).__name__} and not an embedding. Name the embedding."
        )
    if max(tokens) >= weight.shape[0]:
        raise OptionError(
            f"trainable_token_indices: token {max(tokens)} does not exist in {path}, which has {weight.shape[0]}. "
            f"Resize the embedding first, or correct the numbers."
        )

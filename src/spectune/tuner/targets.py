"""Targeted layers that cannot be adapted: refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter import ADAPTERS_ATTRIBUTE
from ..errors import LeftOutError, OptionError, WeightError, nearest
from .config import SpectralConfig


def refuse_output_of_attention(parent: nn.Module, target_name: str, key: str) -> None:
    """Raise `WeightError` for the out_proj of torch's MultiheadAttention, whose forward torch never calls."""
    if isinstance(parent, nn.MultiheadAttention):
        raise WeightError(
            f"{key}: torch's MultiheadAttention reads the weight of its {target_name} and never calls it, so an "
            f"adapter there would do nothing. Target the attention module itself."
        )


def refuse_what_lora_cannot_have(tuner: BaseTuner, model: nn.Module, target_name: str, key: str) -> None:
    """Raise `LeftOutError` for a layer on which PEFT refuses a LoRA: no exported adapter could be loaded there.

    These are Mamba's, whose kernels read the weight and never call the layer.
    """
    try:
        BaseTuner._check_target_module_compatiblity(tuner, LoraConfig(), model, target_name)
    except ValueError as error:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise LeftOutError(
            f"{key}: PEFT refuses a LoRA on {target_name} of a {kind} model, so an adapter trained there could not be "
            f"exported. Exclude the layer.",
            f"PEFT refuses a LoRA on {target_name} of a {kind} model",
        ) from error


def tie_saved_modules(config: SpectralConfig, model: nn.Module, tied: Iterable[str]) -> None:
    """Let PEFT train one copy of tied embeddings, for `ensure_weight_tying` with `modules_to_save`."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    (source,) = (path for path, module in model.named_modules() if module is embeddings)
    setattr(config, "modules_to_tie", set(tied))  # noqa: B010 - PEFT's word, not a field
    ends = [f".{path}" for path in tied]
    saved = [name for name in config.modules_to_save or [] if not any(end.endswith(f".{name}") for end in ends)]
    config.modules_to_save = saved if any(f".{source}".endswith(f".{name}") for name in saved) else [*saved, source]


def refuse_tied_targets() -> None:
    """Raise `OptionError` for `ensure_weight_tying` with an adapted embedding, which is another map in the head."""
    raise OptionError(
        "ensure_weight_tying=True works with modules_to_save and trainable_token_indices; an adapter on a tied "
        "embedding changes only that layer. Leave ensure_weight_tying out, or put the embedding in modules_to_save."
    )


def refuse_name_of_a_part(adapter_name: str, model: nn.Module) -> None:
    """Raise `OptionError` for an adapter with the name of a part of a module's path.

    When PEFT saves, it removes the adapter's name from every key, anywhere, which would lose part of the adapter.
    """
    if adapter_name == ADAPTERS_ATTRIBUTE or adapter_name in _parts(model):
        raise OptionError(
            f"adapter_name={adapter_name!r}: {type(model).__name__} has a module of that name, and PEFT would save the "
            f"adapter without its tensors there. Choose another name."
        )


def _parts(module: nn.Module) -> set[str]:
    """Get every name in the paths of the base model's modules; what PEFT has put there is no part of it."""
    found: set[str] = set()
    for name, child in module.named_children():
        wrapped = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if wrapped and name != "base_layer" and name != "original_module":
            continue
        found |= {name} | _parts(child)
    return found


def refuse_unmatched_targets(config: SpectralConfig, model: nn.Module) -> None:
    """Raise `OptionError` for a name in target_modules that matches the end of no module's path."""
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

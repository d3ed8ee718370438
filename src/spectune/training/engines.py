"""Options of FSDP and DeepSpeed that a run does not support: refused before the first step."""

from __future__ import annotations

from typing import Any

from ..adapter import spectral_modules
from ..errors import OptionError
from .adalora import is_adalora
from .checkpoints import OwnCheckpoints


def refuse_fsdp_options(plugin: Any) -> None:
    """Raise `OptionError` for options of FSDP that an adapted model does not support."""
    options = {
        f"fsdp_version={plugin.fsdp_version}": (plugin.fsdp_version != 2, "fsdp_version: 2"),
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false"),
        f"state_dict_type={plugin.state_dict_type}": (
            "FULL" not in str(plugin.state_dict_type),
            "fsdp_state_dict_type: FULL_STATE_DICT",
        ),
    }
    for option, (refused, instead) in options.items():
        if refused:
            raise OptionError(
                f"accelerate: FSDP with {option} does not shard bases, or saves incomplete checkpoints. "
                f"Set {instead} (examples/accelerate/fsdp2.yaml)."
            )


def refuse_output_embedding(model: Any) -> None:
    """Raise `OptionError` under FSDP2 for an output embedding (lm_head) that is trained in full beside an adapter.

    With PEFT 0.21 and accelerate 1.15 it trains otherwise than on one process, beside a LoRA, too: the loss of a small
    Llama was 0.01 off after one update. A classification head and an input embedding end within 2e-7. The cause was not
    found.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and any(p.requires_grad and "modules_to_save" in name for name, p in head.named_parameters()):
        raise OptionError(
            "accelerate: under FSDP2, an output embedding in modules_to_save (lm_head) trains otherwise than on one "
            "process. Use DDP, or leave it out of modules_to_save."
        )


def refuse_deepspeed_options(plugin: Any, model: Any) -> None:
    """Raise `OptionError` for options of DeepSpeed that a run does not support."""
    if plugin.hf_ds_config.mismatches:
        lines = "; ".join(line.strip("- ").replace("ds ", "DeepSpeed ", 1) for line in plugin.hf_ds_config.mismatches)
        raise OptionError(
            f"accelerate: the DeepSpeed file contradicts the run: {lines}. Leave this out of accelerate's file; then "
            f"the run's own values apply (examples/accelerate/zero2.yaml)."
        )
    if any(module.dynamics for _, _, module in spectral_modules(model)):
        raise OptionError(
            "adapter: singular_decay and grad_norm have no effect under DeepSpeed, whose optimizer does not hold the "
            "adapter's own tensors. Leave them out, or use DDP or FSDP2."
        )
    if plugin.zero_stage == 3 and (is_adalora(model) or isinstance(model, OwnCheckpoints)):
        raise OptionError(
            "accelerate: this adapter reads its whole numbers between steps or saves them itself, and under DeepSpeed "
            "ZeRO-3 no process has them. Use ZeRO-2 or DDP."
        )

"""What FSDP and DeepSpeed can be told, and a run cannot do: refused before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..adapter import SpectralModule
from ..errors import OptionError


def refuse_fsdp_options(plugin: Any) -> None:
    """Raise `OptionError` for what FSDP can be told and an adapted model cannot do."""
    told = {
        f"fsdp_version={plugin.fsdp_version}": (plugin.fsdp_version != 2, "fsdp_version: 2"),
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false"),
        f"state_dict_type={plugin.state_dict_type}": (
            "FULL" not in str(plugin.state_dict_type),
            "fsdp_state_dict_type: FULL_STATE_DICT",
        ),
    }
    for asked, (refused, instead) in told.items():
        if refused:
            raise OptionError(
                f"accelerate: asked for FSDP with {asked}, with which bases are not sharded or checkpoints not whole. "
                f"Set {instead} (examples/accelerate/fsdp2.yaml)."
            )


def refuse_deepspeed_options(plugin: Any, modules: Sequence[SpectralModule]) -> None:
    """Raise `OptionError` for what DeepSpeed can be told and a run cannot do."""
    if plugin.zero_stage == 3:
        raise OptionError(
            "accelerate: asked for DeepSpeed ZeRO-3, which leaves bases whole on every process and no process with an "
            "adapter to save. Use FSDP2 (examples/accelerate/fsdp2.yaml), or ZeRO-2."
        )
    if plugin.hf_ds_config.mismatches:
        told = "; ".join(line.strip("- ").replace("ds ", "DeepSpeed ", 1) for line in plugin.hf_ds_config.mismatches)
        raise OptionError(
            f"accelerate: the DeepSpeed file contradicts the run: {told}. Leave that out of accelerate's file, and the "
            f"run's own values hold (examples/accelerate/zero2.yaml)."
        )
    if any(module.dynamics for module in modules):
        raise OptionError(
            "adapter: asked for singular_decay or grad_norm under DeepSpeed, whose optimizer holds other tensors than "
            "the adapter's, so that neither would act. Leave them out, or use DDP or FSDP2."
        )

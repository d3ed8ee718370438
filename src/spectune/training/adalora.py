"""AdaLoRA's part of each step, and the state that its checkpoints need: PEFT does neither.

AdaLoRA (Zhang et al., arXiv 2303.10512, section 3) drops ranks during training, by running means of their importance.
PEFT's own file has only the ranks that were kept, without the others and the means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback

from ..checkpoint import save_tensors

BUDGET_FILE = "adalora_budget.safetensors"
# Attributes of PEFT's RankAllocator: importance, its running mean, the running mean of its uncertainty.
MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def is_adalora(model: Any) -> bool:
    """Ask whether the model's adapter is AdaLoRA's."""
    return hasattr(getattr(model, "base_model", None), "update_and_allocate")


class AllocateBudget(TrainerCallback):
    """Does AdaLoRA's part of each step; without it, PEFT drops no rank and ignores every option of the budget."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if is_adalora(model):
            model.base_model.update_and_allocate(state.global_step + 1)  # counted from one, as in PEFT's example


def save_budget(model: Any, checkpoint: Path) -> None:
    """Write every number of the adapter, including the ranks that are switched off, and the means."""
    tensors = {f"numbers.{name}": p for name, p in _numbers(model).items()}
    for kind in MEANS:
        tensors |= {f"{kind}.{name}": mean for name, mean in getattr(model.base_model.rankallocator, kind).items()}
    pattern = json.dumps(_config(model).rank_pattern)
    save_tensors(checkpoint / BUDGET_FILE, tensors, {"rank_pattern": pattern})


def load_budget(model: Any, checkpoint: Path) -> None:
    """Load a checkpoint's numbers and means."""
    numbers, allocator = _numbers(model), model.base_model.rankallocator
    with safe_open(checkpoint / BUDGET_FILE, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a file, not a dict)
            kind, _, name = key.partition(".")
            saved = file.get_tensor(key).to(numbers[name].device)
            if kind == "numbers":
                numbers[name].data.copy_(saved)
            else:
                getattr(allocator, kind)[name] = saved
        _config(model).rank_pattern = json.loads(file.metadata()["rank_pattern"])


def _config(model: Any) -> Any:
    return model.peft_config[model.base_model.trainable_adapter_name]


def _numbers(model: Any) -> dict[str, Any]:
    """Get the trained parameters and each layer's number of ranks, by the allocator's names."""
    named = model.base_model.model.named_parameters()
    return {name: p for name, p in named if p.requires_grad or ".ranknum." in name}

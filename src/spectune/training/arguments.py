"""A run's configuration as the arguments of transformers' Trainer and of trl's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import OptionError, one_line
from .config import RunConfig
from .muon import MUON


def loop_arguments(config: RunConfig, folder: Path, device: str | None = None) -> dict[str, Any]:
    """Get a run's values for transformers' TrainingArguments and trl's SFTConfig."""
    asked = config.training
    return {
        "output_dir": str(folder),
        "max_steps": asked.steps or -1,
        "num_train_epochs": asked.epochs or 1,
        "per_device_train_batch_size": asked.batch_size,
        "per_device_eval_batch_size": asked.batch_size,
        "gradient_accumulation_steps": asked.gradient_accumulation,
        "weight_decay": asked.weight_decay,
        "warmup_steps": asked.warmup,
        "lr_scheduler_type": asked.schedule,
        "max_grad_norm": asked.max_grad_norm,
        # Muon is the loop's own, made in `create_optimizer`.
        "optim": "adamw_torch" if asked.optimizer == MUON else asked.optimizer,
        # Otherwise transformers refuses bfloat16 on a CPU, although torch can autocast to it.
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": asked.precision == "bfloat16",
        "fp16": asked.precision == "float16",
        "gradient_checkpointing": asked.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": asked.save_every,
        "save_total_limit": asked.keep_checkpoints,
        "eval_strategy": "no" if asked.validate_every is None else "steps",
        "eval_steps": asked.validate_every,
        "prediction_loss_only": True,
        "report_to": list(asked.report_to),
        "dataloader_num_workers": asked.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": config.seed,
        "logging_steps": 1,
        # Otherwise the Trainer replaces NaN by the mean of the earlier losses, which hides that a run diverged.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def checked_arguments(kind: type[TrainingArguments], values: dict[str, Any]) -> Any:
    """Get transformers' (or trl's) arguments; `OptionError` for values they refuse, such as an optimizer's name."""
    try:
        return one_device(kind(**values))
    except (ValueError, ImportError) as error:
        raise OptionError(f"training: {one_line(error)}.") from error


def one_device(arguments: Any) -> Any:
    """Get the arguments with one device per process. `accelerate launch` is the way to several.

    Otherwise transformers uses every visible device with nn.DataParallel, and a step has that many times the examples.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments

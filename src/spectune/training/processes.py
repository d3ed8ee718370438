"""The processes of a distributed run: which one writes, and how they share what one of them knows.

`torchrun` and `accelerate launch` set their number in the environment; without them, a run is one process.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError, OutputError

# How long a process waits for the others: transformers' own ddp_timeout. On one process, preparing data or a long
# evaluation may take longer than torch's ten minutes with NCCL.
PATIENCE = timedelta(minutes=30)
# By these, `accelerate launch` tells its processes that no one of them will hold the whole model.
SHARDS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def join() -> Any:
    """Get accelerate's `PartialState` of this process; the first call connects it to the others.

    Call it before the model is built, so that the processes divide the decompositions among themselves.
    """
    try:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env
    except ImportError as error:
        raise MissingExtraError(
            f"training: cannot import accelerate ({error}). Run: pip install 'spectune[train]'"
        ) from None
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def on_training_device(model: nn.Module) -> nn.Module:
    """Move a model to where it will be trained, so that what is done before the first step is done there, too.

    Not a quantised one, which transformers has placed, nor one that FSDP or DeepSpeed will shard: it may not fit.
    """
    state = join()
    from accelerate.utils import parse_flag_from_env

    if not getattr(model, "is_quantized", False) and not any(parse_flag_from_env(name) for name in SHARDS):
        model.to(state.device)
    return model


def on_main(work: Callable[[], None]) -> None:
    """Let the main process do something while the others wait; its `OutputError` is raised on all of them."""
    state, failure = join(), ""
    if state.is_main_process:
        try:
            work()
        except OutputError as error:
            failure = str(error)
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (failure,) = broadcast_object_list([failure])
    if failure:
        raise OutputError(failure)


def anywhere(flag: bool) -> bool:
    """Ask whether the flag is set in any process; all of them get the same answer."""
    state = join()
    if state.num_processes == 1:
        return flag
    from accelerate.utils import reduce

    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)

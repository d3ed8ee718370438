"""Tensors that are kept elsewhere between the forwards of their module: by accelerate, or in parts by processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Get a block in which a module's own tensors are here; what was read there stays readable afterwards.

    accelerate's hooks fetch the tensors when the module's forward is called. An adapted layer reads some without it:
    the factors of a convolution, a core that another layer holds, the packed weight of an attention.
    """
    hook = module.__dict__.get("_hf_hook")
    return nullcontext() if hook is None or not _is_elsewhere(module) else _fetched(module, hook)


def is_cut(tensor: torch.Tensor) -> bool:
    """Ask whether this process holds only a part of a tensor: under FSDP2, tensor parallelism or ZeRO-3."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def gathered(*tensors: torch.Tensor, writes: bool = False) -> AbstractContextManager[Any]:
    """Get a block in which what ZeRO-3 has cut is whole; all processes must enter it.

    What the first process `writes` there is kept.
    """
    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if writes else None)
    return found


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Get what to call inside of `at_hand(module)`, asked before it.

    accelerate's own forward would fetch the tensors once more, over what was put in their places meanwhile.
    """
    hooked = "_hf_hook" in module.__dict__ and _is_elsewhere(module)
    return module._old_forward if hooked else module  # type: ignore[return-value]


def _is_elsewhere(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.is_meta for tensor in own)


@contextmanager
def _fetched(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)

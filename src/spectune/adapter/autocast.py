"""Whether autocast is on for a tensor, and a block without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for a tensor's device; torch refuses the question for meta tensors."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def in_own_dtype(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Get a block in which autocast rounds nothing on this tensor's device.

    Updates are computed in one: a core such as R_U S R_V^T - S is a small difference, which bfloat16 factors lose.
    """
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()

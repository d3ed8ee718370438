"""A batch whose rows use different adapters: the names of its rows, on their way to the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

# Whether the rows of the running forward name their adapters, so that no single weight serves them all.
ROWS_DIFFER: ContextVar[bool] = ContextVar("rows_differ", default=False)


@contextmanager
def rows_named(modules: Sequence[nn.Module], names: Sequence[str], copies: int) -> Iterator[None]:
    """Give these modules the names of the rows with each of their calls, for the time of the block."""
    # New lists: the layers know a batch that they have seen by its list, and a caller may write into its own.
    names, repeated = list(names), [name for name in names for _ in range(copies)]
    hook = partial(_pass_adapter_names, names, repeated)
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    token = ROWS_DIFFER.set(True)
    try:
        yield
    finally:
        ROWS_DIFFER.reset(token)
        for handle in hooks:
            handle.remove()


def _pass_adapter_names(
    names: list[str], repeated: list[str], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Give a layer the names of its rows: an encoder sees the rows as they were given, a decoder with their copies."""
    as_given = args and isinstance(args[0], torch.Tensor) and len(args[0]) == len(names)
    return args, {**kwargs, "adapter_names": names if as_given else repeated}

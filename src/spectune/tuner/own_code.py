"""Layers whose own code, or whose owner's, does more than x W^T + b, and what an adapter there needs."""

from __future__ import annotations

import inspect
import re
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import LeftOutError
from .base_weight import LAYOUTS

# Attributes of a weight that do not read its numbers.
PROPERTIES = (
    "dtype|device|shape|ndim|requires_grad|is_meta|is_cuda|layout|size|dim|numel|element_size|is_floating_point"
)

# Whose code on weights (starts, ties, sizes) has run before an adapter is attached.
BEFORE_ANY_ADAPTER = ("torch.nn.modules.module", "transformers.modeling_utils")
# Functions that a forward never calls: starts, and what diffusers' users call to join q, k and v.
NOT_IN_A_FORWARD = ("__init__", "_init_weights", "fuse_projections")


def is_read(model: nn.Module, path: str) -> tuple[bool, bool]:
    """Ask whether the code of the modules around a layer reads its weight, and whether it does nothing else with it.

    So do Mamba's mixers (kernels take the weights), torch's fast path of transformer encoders, heads that share an
    embedding by hand, and fused losses. Found in the source of every owner: `<...>.layer.weight` in the layer's parent,
    `self.<...>.layer.weight` further up. A weight handed on under another name is not found.
    """
    parts, read, called = path.split("."), False, False
    for depth in range(len(parts)):
        name = ".".join(parts[depth:])
        if not all(part.isidentifier() for part in parts[depth:]):  # no code can say self.layers.0
            continue
        owner = model.get_submodule(".".join(parts[:depth]))
        kind: Any = type(owner)
        receiver = r"\w" if depth == len(parts) - 1 else r"\bself"
        uses = [_uses_by_class(kind, receiver, name)]
        if (forward := vars(owner).get("forward")) is not None:
            uses.append(_uses(_source(forward), receiver, name))
        read, called = read or any(use[0] for use in uses), called or any(use[1] for use in uses)
    return read, read and not called


@cache
def _uses_by_class(kind: Any, receiver: str, name: str) -> tuple[bool, bool]:
    return _uses(_sources(kind), receiver, name)


def _uses(source: str, receiver: str, name: str) -> tuple[bool, bool]:
    """Ask whether code reads the weight of a layer, and whether it calls the layer."""
    if f".{name}" not in source:
        return False, False
    layer = rf"{receiver}\.{re.escape(name)}"
    read = re.finditer(rf"(isinstance\(\w*\s*)?{layer}\.weight\b(?!\.(?:{PROPERTIES})\b)(?!\s*=[^=])", source)
    return any(match[1] is None for match in read), re.search(rf"{layer}\(", source) is not None


@cache
def _sources(kind: Any) -> str:
    """Get the source of a class and of those it inherits from; without their starts, which run before any adapter."""
    owners = [owner for owner in kind.__mro__ if owner.__module__ not in ("builtins", *BEFORE_ANY_ADAPTER)]
    parts = [vars(owner).items() for owner in owners]
    return "\n".join(_source(part) for name, part in chain(*parts) if name not in NOT_IN_A_FORWARD)


def _source(part: Any) -> str:
    """Get the source of a function or method; nothing of what is compiled, typed into an interpreter, or neither."""
    if not inspect.isroutine(part):
        return ""
    try:
        return inspect.getsource(inspect.unwrap(part))
    except (OSError, TypeError):
        return ""


def has_own_forward(layer: nn.Module, name: str) -> bool:
    """Ask whether a layer's class computes something else than the kind of layer it is a child of.

    Such a layer (scaled, grouped or normalised weights, shifted positions) runs its own code on the tuned weight. A
    linear layer is asked by running it once. `LeftOutError` for one that returns more than one tensor, as routers do.
    """
    kind: Any = next(kind for kind in LAYOUTS if isinstance(layer, kind))
    if type(layer).forward is kind.forward or hasattr(layer, "embed_scale"):
        return False
    return not isinstance(layer, nn.Linear) or not _is_plain_product(layer, name)


def _is_plain_product(layer: nn.Linear, name: str) -> bool:
    weight = layer.weight
    # Any input would do that no layer takes for padding: rising numbers, about as large as activations. Chosen.
    x_NI = torch.linspace(-1, 1, layer.in_features, device=weight.device, dtype=weight.dtype).repeat(2, 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y = layer.forward(x_NI)
        except Exception:  # its input has another form; whatever it is, its own code will meet it
            return False
        if not isinstance(y, torch.Tensor):
            raise LeftOutError(
                f"{name}: a {type(layer).__name__} returns {type(y).__name__} and not one tensor, so an update cannot "
                f"be added to it. Exclude the layer.",
                f"a {type(layer).__name__} returns more than one tensor",
            )
        plain_NO = F.linear(x_NI, weight, layer.bias)
        return y.shape == plain_NO.shape and not y.is_meta and torch.allclose(y, plain_NO, rtol=1e-2, atol=1e-3)

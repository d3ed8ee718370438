"""Factors of experts that a model stores in one parameter, arranged as PEFT's LoRA reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ExportError
from .paths import base_path

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StackPlace:
    """Which matrix of which parameter a layer is, and where PEFT keeps the factors of that parameter."""

    parameter: str
    key: str
    """PEFT's path for the factors in a file: one `base_layer` for each adapted parameter of the module that follows."""
    index: int
    count: int
    swapped: bool
    """Whether PEFT takes outputs for inputs here: it asks the module's `is_transposed`, and not every module has it."""


def stack_place(model: nn.Module, path: str, adapter_name: str) -> StackPlace | None:
    """Get the place of an adapted layer in a stack; None for a layer of its own.

    `ExportError` for the one stack that PEFT adds the wrong way round: a single matrix stored in x out.
    """
    layer: Any = model.get_submodule(path)
    if layer.layout.kind != "expert":
        return None
    stack = layer.stack
    wrapper: Any = model.get_submodule(module := path.rsplit(".", 2)[0])
    adapted = {
        attribute
        for attribute, other in wrapper.stacks()
        if any(adapter_name in expert.spectune_adapter for expert in other.experts)
    }
    order = [name for name, _ in stack.owner.named_parameters(recurse=False) if name in adapted]
    after = len(order) - 1 - order.index(stack.layout.attribute)
    parameter = getattr(stack.owner, stack.layout.attribute)
    as_peft_says = parameter.ndim == 3 and bool(getattr(stack.owner, "is_transposed", False))
    if as_peft_says and len(stack) == 1:
        raise ExportError(
            f"{base_path(model, path)}: PEFT adds a LoRA to a single expert that is stored in x out the wrong way "
            "round. Merge the adapter instead."
        )
    name = f"{base_path(model, module)}.{stack.layout.attribute}"
    key = base_path(model, module) + ".base_layer" * after
    return StackPlace(name, key, int(path.rpartition(".")[2]), len(stack), stack.layout.transposed != as_peft_says)


def stack_factors(place: StackPlace, experts: Mapping[int, Pair]) -> Pair:
    """Get (lora_B, lora_A) of a parameter from the (B_OP, A_PI) of its experts; who has none gets zeros.

    lora_A has the rows of one expert after those of the other, lora_B the columns of all experts side by side for each
    of the P directions.
    """
    pairs = {index: (A.T, B.T) if place.swapped else (B, A) for index, (B, A) in experts.items()}
    rank_P = max(A_PI.shape[0] for _, A_PI in pairs.values())
    B_OP, A_PI = next(iter(pairs.values()))
    none = B_OP.new_zeros(B_OP.shape[0], rank_P), A_PI.new_zeros(rank_P, A_PI.shape[1])
    whole = [pairs.get(index, none) for index in range(place.count)]
    wide = [nn.functional.pad(B_OP, (0, rank_P - B_OP.shape[1])) for B_OP, _ in whole]
    tall = [nn.functional.pad(A_PI, (0, 0, 0, rank_P - A_PI.shape[0])) for _, A_PI in whole]
    return torch.stack(wide).permute(1, 2, 0).flatten(1).contiguous(), torch.stack(tall).flatten(0, 1)


def unstack_factors(place: StackPlace, lora_B: torch.Tensor, lora_A: torch.Tensor) -> Pair:
    """Get (B_OP, A_PI) of one expert from the factors of its parameter."""
    if lora_A.shape[0] % place.count or lora_B.shape[1] != lora_A.shape[0]:
        raise ExportError(
            f"{place.parameter}: the factors are {tuple(lora_B.shape)} and {tuple(lora_A.shape)}, not the same rank "
            f"for each of {place.count} experts. Export the adapter again."
        )
    A_PI = lora_A.reshape(place.count, -1, lora_A.shape[1])[place.index]
    B_OP = lora_B.reshape(lora_B.shape[0], -1, place.count)[..., place.index]
    return (A_PI.T, B_OP.T) if place.swapped else (B_OP, A_PI)

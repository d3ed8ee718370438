"""Which singular directions of a LoRA its own task would miss, and which stay under a budget over all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..algebra import truncate
from ..checkpoint import LoraFile
from ..checkpoint.adapter_folder import PEFT_PREFIX
from ..errors import AdapterError, ExportError, OptionError

Directions = tuple[torch.Tensor, torch.Tensor]
"""(B_OK, A_KI), column i of B and row i of A: sqrt(s_i) u_i and sqrt(s_i) v_i, so that dW = B A."""
LossOf = Callable[[nn.Module, dict[str, Any]], torch.Tensor]


def directions_of(source: LoraFile, layer: str) -> Directions:
    """Get the singular directions of a layer's update, the largest first, in float64; at least one.

    `ExportError` for factors that are not finite.
    """
    B_OP, A_PI = (factor.double() for factor in source.factors(layer))
    if not (torch.isfinite(B_OP).all() and torch.isfinite(A_PI).all()):
        raise ExportError(f"{layer}: the factors contain NaN or infinity. Train or copy the LoRA again.")
    B_OK, A_KI, _ = truncate(B_OP * source.layers[layer].scaling, A_PI, len(A_PI))
    S_K = B_OK.square().sum(0)
    roundoff = max(len(B_OK), A_KI.shape[1]) * torch.finfo(torch.float64).eps * S_K.max()
    alive = max(1, int((roundoff < S_K).sum()))
    return B_OK[:, :alive], A_KI[:alive]


def energies(source: LoraFile) -> dict[str, torch.Tensor]:
    """Get layer -> s_i^2 of its directions: what |dW|_F^2 loses without each."""
    return {layer: directions_of(source, layer)[0].square().sum(0).square() for layer in source.layers}


def calibrated(
    model: nn.Module, source: LoraFile, batches: Iterable[dict[str, Any]], loss: LossOf, adapter: str = "default"
) -> dict[str, torch.Tensor]:
    """Get layer -> a score for each of its directions: how much the loss of these batches would feel its absence.

    F_i = mean_k (s_i u_i^T G_k v_i)^2, G_k the gradient of batch k with respect to the tuned weight: the diagonal of
    the empirical Fisher matrix along s_i, times s_i^2, which is twice the loss expected without the direction where
    the gradient's mean is zero, as after training (optimal brain damage, LeCun et al. 1990; for the singular values of
    LoRAs arXiv 2603.03995). G_k is never made: B^T G is the gradient of A. `model` has the LoRA attached by PEFT;
    its parameters end without gradients. `AdapterError` if it lacks a layer of the file.
    """
    watched = {layer: _factor(model, layer, adapter) for layer in source.layers}
    turns = {layer: _turned(source, layer) for layer in source.layers}
    totals = {layer: torch.zeros(turn.shape[1], dtype=torch.float64) for layer, (turn, _) in turns.items()}
    model.requires_grad_(False)
    for parameter in watched.values():
        parameter.requires_grad_(True)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        for layer, (C_PK, A_KI) in turns.items():
            gradient = watched[layer].grad
            if gradient is not None:
                G_PI = gradient.detach().flatten(1).double().cpu()
                totals[layer] += ((C_PK.mT @ G_PI) * A_KI).sum(1).square()
    model.zero_grad(set_to_none=True)
    return totals


def _turned(source: LoraFile, layer: str) -> Directions:
    """Get (C_PK, A_KI) with B_OK = scaling B C: the gradient along direction i is c_i^T (dL/dA) a_i."""
    B_OK, A_KI = directions_of(source, layer)
    B_OP = source.factors(layer)[0].double() * source.layers[layer].scaling
    return torch.linalg.lstsq(B_OP, B_OK, driver="gelsd").solution, A_KI


def _factor(model: nn.Module, layer: str, adapter: str) -> nn.Parameter:
    try:
        module: Any = model.get_submodule(PEFT_PREFIX + layer)
        held = module.lora_A if adapter in module.lora_A else module.lora_embedding_A
        found = held[adapter]
    except (AttributeError, KeyError):
        raise AdapterError(f"{layer}: the model has no LoRA here. Attach this very LoRA to it.") from None
    parameter: nn.Parameter = found if isinstance(found, nn.Parameter) else found.weight
    return parameter


def within_share(scores: Mapping[str, torch.Tensor], sides: Mapping[str, int], budget: float) -> dict[str, list[int]]:
    """Get layer -> the places of the directions that stay: the highest scores by number, over all layers.

    A direction of layer l costs `sides[l]` numbers, O + I. They are taken in order of score by number, while they fit
    into `budget` numbers; a layer may end without any. `OptionError` for a budget that holds no direction at all.
    """
    left = budget
    kept: dict[str, list[int]] = {layer: [] for layer in scores}
    ranked = sorted(
        (-float(value) / sides[layer], layer, place)
        for layer, score in scores.items()
        for place, value in enumerate(score)
    )
    for _, layer, place in ranked:
        if sides[layer] <= left:
            kept[layer].append(place)
            left -= sides[layer]
    if not any(kept.values()):
        raise OptionError(
            f"share: {budget:,.0f} numbers are less than one direction of one layer, {min(sides.values()):,}. Give a "
            f"larger share."
        )
    return {layer: sorted(places) for layer, places in kept.items()}

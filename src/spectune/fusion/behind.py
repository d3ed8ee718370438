"""`fuse_behind`: rules that look at each layer behind the layers that are merged already, in the order of a forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapter import in_eval_mode
from ..errors import OptionError, nearest
from ..records import Delta
from .contract import Fusion, Part
from .layer_inputs import convolves, matrix_of, multiplies
from .walk import Forward, Inputs, NotAChainError, Updates, Walk

# The task of the examples that the merge must leave as the base has them.
KEPT = "the base"


@dataclass
class _Sums:
    """Sums over tokens of x x^T and z x^T, in float64."""

    gram_II: torch.Tensor | float = 0.0
    cross_II: torch.Tensor | float = 0.0
    tokens: int = 0

    def add(self, z_NI: torch.Tensor, x_NI: torch.Tensor) -> None:
        z_NI, x_NI = z_NI.double(), x_NI.double()
        self.gram_II = self.gram_II + x_NI.mT @ x_NI
        self.cross_II = self.cross_II + z_NI.mT @ x_NI
        self.tokens += len(x_NI)


@torch.no_grad()
def fuse_behind(
    rule: Fusion,
    model: nn.Module,
    layers: Mapping[str, Sequence[Part]],
    weights: Mapping[str, float],
    examples: Mapping[str, Sequence[Inputs]],
    keep: Sequence[Inputs] = (),
    on_layers: Callable[[int, int], Any] | None = None,
) -> dict[str, Part]:
    """Get layer -> fused part, layer after layer, each from what reaches it behind the layers that are merged.

    `examples` are each adapter's batches for the base `model`, `keep` those of neutral use: a task without an update,
    of weight 1, whose outputs the merge should leave alone. Each example runs through a block once for each group of
    layers with one input (see `Walk`), twice for a rule that compares with the adapters' own models; its hidden states
    are held on the CPU for one block. `on_layers` is called with (layers done, layers in all).
    """
    tasks = dict(examples) | ({KEPT: list(keep)} if keep else {})
    shares = dict(weights) | ({KEPT: 1.0} if keep else {})
    known = dict(model.named_modules())
    walk = Walk(model, {layer: _module(known, layer) for layer in layers})
    device, dtype = walk.at
    own: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    for layer, parts in layers.items():
        for part in parts:
            own[part.adapter][layer] = _placed(part.delta, device, dtype)
    tasks = {task: [_on(batch, device) for batch in batches] for task, batches in tasks.items()}
    with in_eval_mode(model):
        try:
            fused = _walked(rule, walk, layers, shares, tasks, own, on_layers)
        except NotAChainError:
            warnings.warn(
                f"{type(model).__name__}: its blocks do not only feed the next one, so none can be left out. The merge "
                f"begins again and reaches each layer from the start, which takes longer.",
                stacklevel=2,
            )
            fused = _walked(rule, walk, layers, shares, tasks, own, on_layers, leave_out=False)
    return {layer: fused[layer] for layer in layers}


def _walked(
    rule: Fusion,
    walk: Walk,
    layers: Mapping[str, Sequence[Part]],
    shares: Mapping[str, float],
    tasks: Mapping[str, Sequence[Inputs]],
    own: Mapping[str, Updates],
    on_layers: Callable[[int, int], Any] | None,
    leave_out: bool = True,
) -> dict[str, Part]:
    fused: dict[str, Part] = {}
    merged: dict[str, Delta] = {}
    runs = {task: [Forward(merged, batch) for batch in batches] for task, batches in tasks.items()}
    theirs = {task: [Forward(own[task], batch) for batch in batches] for task, batches in tasks.items()}
    looked = [run for task in tasks for run in runs[task] + (theirs[task] if rule.compares else [])]
    for stage in walk.stages([batches[0] for batches in tasks.values()], leave_out):
        walk.go_to(stage, looked)
        seen = {task: _Sums() for task in tasks}
        for task, sums in seen.items():
            for run, alone in zip(runs[task], theirs[task], strict=True):
                x_NI = walk.input_of(stage.layers[0], run)
                sums.add(walk.input_of(stage.layers[0], alone) if rule.compares else x_NI, x_NI)
        for layer in stage.layers:
            parts = [_looked_at(layers[layer], task, sums, walk.modules[layer]) for task, sums in seen.items()]
            fused[layer] = rule.fuse(parts, [shares[part.adapter] for part in parts])
            merged[layer] = _placed(fused[layer].delta, *walk.at)
        if on_layers is not None:
            on_layers(len(fused), len(layers))
    return fused


def _looked_at(parts: Sequence[Part], task: str, sums: _Sums, module: nn.Module) -> Part:
    """Get the part of one task in a layer with what was seen; one without an update where it has none here."""
    rows_O, cols_I = parts[0].delta.shape
    zero = parts[0].delta.left_OP
    nothing = Delta(zero.new_zeros(rows_O, 1), zero.new_zeros(1), zero.new_zeros(1, cols_I))
    part = next((p for p in parts if p.adapter == task), None) or Part(
        task, parts[0].layer, nothing, stored=parts[0].stored
    )
    W_OI = matrix_of(module).to(zero)
    gram_II, cross_II = (torch.as_tensor(total).to(zero) / sums.tokens for total in (sums.gram_II, sums.cross_II))
    return replace(part, gram_II=gram_II, cross_II=cross_II, weight_OI=W_OI)


def _module(known: Mapping[str, nn.Module], layer: str) -> nn.Module:
    """Get a layer of the model, which may lack the leading names of the one that the adapters were trained on."""
    parts = layer.split(".")
    names = (".".join(parts[start:]) for start in range(len(parts)))
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise OptionError(f"{layer!r} is not a layer of {type(known['']).__name__}. {nearest(layer, list(known))}")
    weight = getattr(found, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    if not plain or not (multiplies(found) or convolves(found)) or isinstance(found, nn.Embedding):
        raise OptionError(
            f"{layer}: rules that look at the merged model work on linear layers and ungrouped convolutions (1d, 2d) "
            f"with zero padding, both with plain weights, and this is a {type(found).__name__}. Use "
            f"rule='task_singular' or 'average'."
        )
    return found


def _placed(delta: Delta, device: torch.device, dtype: torch.dtype) -> Delta:
    core = delta.core
    if isinstance(core, torch.Tensor):
        return Delta(delta.left_OP.to(device, dtype), core.to(device, dtype), delta.right_QI.to(device, dtype))
    moved = replace(
        core, rows_C=core.rows_C.to(device), cols_C=core.cols_C.to(device), values_C=core.values_C.to(device, dtype)
    )
    return Delta(delta.left_OP.to(device, dtype), moved, delta.right_QI.to(device, dtype))


def _on(batch: Inputs, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

"""`fuse_behind`: rules that look at each layer behind the layers that are merged already, in the order of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapter import in_eval_mode
from ..algebra import apply
from ..errors import OptionError, nearest
from ..records import Delta
from .activations import input_in, seen_rows
from .contract import Fusion, Part

Inputs = Mapping[str, Any]
Updates = Mapping[str, Delta]
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


class _ReachedError(Exception):
    """Ends a forward at the layer whose input was wanted."""


@dataclass(eq=False)
class _Model:
    """The base model, run with updates added to its layers; nothing in it is changed."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """Layer, as the adapters call it -> module."""

    @contextmanager
    def tuned(self, updates: Updates) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, delta in updates.items():
                stack.callback(self.modules[layer].register_forward_hook(_adding(delta), with_kwargs=True).remove)
            yield

    def input_of(self, layer: str, updates: Updates, batch: Inputs) -> torch.Tensor:
        """Get what reaches a layer, as rows; tokens that an attention mask hides are left out."""
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(input_in(args, kwargs).detach())
            raise _ReachedError

        handle = self.modules[layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with self.tuned(updates):
                self.model(**batch)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        if not caught:
            raise OptionError(f"{layer}: no example went through this layer. Pass examples that use it.")
        return seen_rows(caught[0], batch.get("attention_mask"))

    def groups(self, batch: Inputs) -> list[list[str]]:
        """Get the layers in the order of a forward pass, those that get one input together."""
        order: list[tuple[str, tuple[int, ...]]] = []
        keep: list[torch.Tensor] = []  # so that no address is used twice

        def note(layer: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = input_in(args, kwargs)
                keep.append(x)
                if all(layer != known for known, _ in order):
                    order.append((layer, (x.data_ptr(), x._version, *x.shape)))

            return hook

        with ExitStack() as stack:
            for layer, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(note(layer), with_kwargs=True).remove)
            self.model(**batch)
        groups: list[list[str]] = []
        for place, (layer, found) in enumerate(order):
            if place and found == order[place - 1][1]:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        missing = sorted(self.modules.keys() - {layer for layer, _ in order})
        if missing:
            raise OptionError(f"{missing[0]}: no example went through this layer. Pass examples that use it.")
        return groups


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
    of weight 1, whose outputs the merge should leave alone. One forward of each example for each group of layers with
    one input, as far as that layer; two for a rule that compares with the adapters' own models. `on_layers` is called
    with (layers done, layers in all).
    """
    tasks = dict(examples) | ({KEPT: list(keep)} if keep else {})
    shares = dict(weights) | ({KEPT: 1.0} if keep else {})
    known = dict(model.named_modules())
    places = {layer: _module(known, layer) for layer in layers}
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    own: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    for layer, parts in layers.items():
        for part in parts:
            own[part.adapter][layer] = _placed(part.delta, device, dtype)
    tasks = {task: [_on(batch, device) for batch in batches] for task, batches in tasks.items()}
    runner = _Model(model, places)
    fused: dict[str, Part] = {}
    merged: dict[str, Delta] = {}
    with in_eval_mode(model):
        for group in runner.groups(next(batch for batches in tasks.values() for batch in batches)):
            seen = {task: _Sums() for task in tasks}
            for task, batches in tasks.items():
                for batch in batches:
                    x_NI = runner.input_of(group[0], merged, batch)
                    z_NI = runner.input_of(group[0], own[task], batch) if rule.compares else x_NI
                    seen[task].add(z_NI, x_NI)
            for layer in group:
                parts = [_looked_at(layers[layer], task, sums, places[layer]) for task, sums in seen.items()]
                fused[layer] = rule.fuse(parts, [shares[part.adapter] for part in parts])
                merged[layer] = _placed(fused[layer].delta, device, dtype)
            if on_layers is not None:
                on_layers(len(fused), len(layers))
    return {layer: fused[layer] for layer in layers}


def _looked_at(parts: Sequence[Part], task: str, sums: _Sums, module: nn.Module) -> Part:
    """Get the part of one task in a layer with what was seen; one without an update where it has none here."""
    rows_O, cols_I = parts[0].delta.shape
    zero = parts[0].delta.left_OP
    nothing = Delta(zero.new_zeros(rows_O, 1), zero.new_zeros(1), zero.new_zeros(1, cols_I))
    part = next((p for p in parts if p.adapter == task), None) or Part(
        task, parts[0].layer, nothing, stored=parts[0].stored
    )
    stored: Any = module.weight
    W_OI = (stored.T if _stores_inputs_first(module) else stored).detach().to(zero)
    gram_II, cross_II = (torch.as_tensor(total).to(zero) / sums.tokens for total in (sums.gram_II, sums.cross_II))
    return replace(part, gram_II=gram_II, cross_II=cross_II, weight_OI=W_OI)


def _stores_inputs_first(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)  # transformers' Conv1D


def _module(known: Mapping[str, nn.Module], layer: str) -> nn.Module:
    """Get a layer of the model, which may lack the leading names of the one that the adapters were trained on."""
    parts = layer.split(".")
    names = (".".join(parts[start:]) for start in range(len(parts)))
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise OptionError(f"{layer!r} is not a layer of {type(known['']).__name__}. {nearest(layer, list(known))}")
    weight = getattr(found, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()
    if not plain or isinstance(found, nn.Embedding):
        raise OptionError(
            f"{layer}: rules that look at the merged model work on linear layers with plain weights, and this is a "
            f"{type(found).__name__}. Use rule='task_singular' or 'average'."
        )
    return found


def _adding(delta: Delta) -> Callable[..., torch.Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return output + apply(delta, input_in(args, kwargs))

    return hook


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

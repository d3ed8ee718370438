"""`dry_run`: what a run would do, without a step: one example, layers, counts, memory, rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint import PEFT_PREFIX
from ..recipes.recipe import Recipe, Shown
from ..recipes.table import recipe_class
from ..training.config import RunConfig
from ..training.loop import quiet_libraries
from ..training.rates import said
from .building import build, numbers

# The longest of this many examples measures the activations. Chosen.
LOOKED_AT = 64


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while training, without the allocator's fragmentation and the CUDA context."""

    weights: int
    """Every parameter and buffer, including the adapter's frozen bases."""
    gradients: int
    optimizer: int
    """Two float32 numbers for each trained one, as in AdamW."""
    activations: int
    """Bytes that autograd keeps of one forward with the longest of the first 64 examples, times the batch size."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class DryRun:
    """The contents of `spectune check`."""

    shown: Shown
    layers: list[tuple[str, list[int]]]
    """Name and weight shape of each adapted layer; empty in full fine-tuning."""
    trainable: int
    head: int
    total: int
    examples: dict[str, int]
    classes: dict[str, dict[str, int]]
    """Split -> class -> number of examples; empty without classes."""
    memory: Memory
    rates: dict[str, Any]
    remarks: list[str]


def dry_run(config: RunConfig) -> DryRun:
    """Get what a run would do; raises for everything that `train` refuses."""
    quiet_libraries()
    recipe = recipe_class(config.recipe)(config)
    recipe.prepare()
    examples = {split: len(rows) for split, rows in recipe.splits.items()}
    if config.training.validate_every is not None:
        recipe.validation_split()
    model, plan = build(recipe, to_train=False)  # the GPU may be busy
    layers = [
        (name.replace(PEFT_PREFIX, "", 1), list(layer.base_layer.weight.shape))
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "base_layer", None), nn.Module) and hasattr(layer.base_layer, "weight")
    ]
    rates = said(config)
    advice = [rates[name] for name in ("choice", "advice") if rates[name]]
    return DryRun(
        shown=recipe.show(),
        layers=layers,
        examples=examples,
        classes=recipe.classes(),
        memory=_memory(recipe, model, [p for group, _ in plan.rates for p in group]),
        rates=rates,
        remarks=[*advice, *recipe.warnings(), *recipe.remarks()],
        **numbers(model, plan),
    )


def _memory(recipe: Recipe, model: nn.Module, trained: list[nn.Parameter]) -> Memory:
    frozen = [*model.parameters(), *model.buffers()]
    return Memory(
        weights=sum(t.numel() * t.element_size() for t in frozen),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=sum(p.numel() * 8 for p in trained),
        activations=_activations(recipe, model, {t.untyped_storage().data_ptr() for t in frozen})
        * recipe.config.training.batch_size,
    )


def _activations(recipe: Recipe, model: nn.Module, known: set[int]) -> int:
    """Get the bytes that autograd keeps of one example's forward, besides the model's own tensors."""
    rows = recipe.rows("train")
    first = [rows[i] for i in range(min(LOOKED_AT, len(rows)))]
    longest = max(first, key=lambda row: len(row.get("input_ids", ())))
    device = next(model.parameters()).device  # a quantised model is on a GPU where there is one
    batch = {name: tensor.to(device) for name, tensor in recipe.collate([longest]).items()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = recipe.loss(model, batch) if recipe.loss is not None else model(**batch).loss
    del loss  # until here, the graph keeps the tensors, so that no address was reused
    return sum(kept.values())

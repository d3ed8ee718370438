"""The model that a run trains: base, new head, adapter, and learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ..adapter import spectral_modules
from ..errors import OptionError
from ..recipes.recipe import Recipe
from ..training.config import HEAD, RunConfig
from ..training.loop import Plan
from ..training.muon import MUON, refuse_without_matrices
from ..training.processes import on_training_device
from ..training.rates import head_learning_rate, learning_rate, method_of, usual_rate
from ..training.zero import count, cut_while_loading, refuse_examples_first
from ..tuner import attach, build_adapter_config
from .drawn_examples import refuse_other_bases
from .examples_first import directions_of_examples, fit_head


def build(recipe: Recipe, *, to_train: bool = True) -> tuple[nn.Module, Plan]:
    """Get the model that a run trains, with its adapter and its learning rates.

    `to_train`: on the device of the training, where heads are fitted and weights decomposed many times as fast.
    """
    config = recipe.config
    if config.training.precision == "float16" and not torch.accelerator.is_available():
        raise OptionError(
            "training.precision=float16: autocast needs an accelerator, and a CPU would compute in float32. Use "
            "bfloat16 or float32."
        )
    refuse_other_bases(config)
    set_seed(config.seed)  # a new head and LoRA's A are random
    with cut_while_loading() if to_train else nullcontext():
        model = recipe.build_model()
    own = recipe.attach(model)
    if own is not None:
        return own[0], _plan(recipe, own[0], own[1])
    if to_train:
        model = on_training_device(model)
    heads = recipe.head(model)
    options = config.adapter_options
    adapter = None if options is None else _adapter(recipe, options, heads)
    refuse_examples_first(model, config.training.head_first, getattr(adapter, "needs_examples", ""))
    if config.training.head_first:
        fit_head(recipe, model, heads)
    if adapter is not None:
        model = attach(model, directions_of_examples(recipe, model, adapter, bool(heads)))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if _is_head(name, heads, options is not None)]
    if config.adapter == HEAD:
        named = _only(model, head, config)
    known = {id(p) for p in head}
    body = [p for _, p in named if id(p) not in known]
    if not body and config.adapter != HEAD:
        raise OptionError(f"adapter: {config.adapter} leaves nothing to train. Name other target_modules.")
    if not head and config.training.head_learning_rate is not None:
        raise OptionError("training.head_learning_rate: this run has no new head. Leave it out.")
    return model, _plan(recipe, model, [(body, learning_rate(config)), (head, head_learning_rate(config))])


def _adapter(recipe: Recipe, options: dict[str, Any], heads: list[str]) -> Any:
    options.setdefault("task_type", recipe.task_type)
    options.setdefault("revision", recipe.config.revision)  # the adapter needs exactly this base
    if heads:
        options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or []), *heads]))
    return build_adapter_config(options)


def _plan(recipe: Recipe, model: nn.Module, rates: Sequence[tuple[Sequence[nn.Parameter], float]]) -> Plan:
    config = recipe.config
    if config.training.optimizer != MUON:
        return Plan(rates, recipe.loss)
    refuse_without_matrices(model)
    return Plan(rates, recipe.loss, muon=usual_rate(method_of(config), "training.learning_rate"))


def _only(model: nn.Module, head: list[nn.Parameter], config: RunConfig) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything but the head, and get its parameters."""
    if not head:
        raise OptionError(
            f"adapter: head: with {config.recipe}, this model gets no new head to train. Choose an adapter."
        )
    kept = {id(p) for p in head}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _is_head(name: str, heads: list[str], adapted: bool) -> bool:
    return ".modules_to_save." in name if adapted else any(name.startswith(f"{head}.") for head in heads)


def numbers(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Get the counts of trained numbers in the adapter (or model) and in the head, and of the base's numbers."""
    body, head, *others = (sum(map(count, group)) for group, _ in plan.rates)
    adapters = {id(p) for _, _, module in spectral_modules(model) for p in module.parameters()}
    copies = ("lora_", ".modules_to_save.", "new_word")  # added by PEFT, and a row of the embedding
    total = sum(
        count(p)
        for name, p in model.named_parameters()
        if id(p) not in adapters and not (p.requires_grad and any(word in name for word in copies))
    )
    return {"trainable": body + sum(others), "head": head, "total": total}

"""trl's trainers on a run's model: imported when needed, on rows that the recipe made tokens of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..errors import MissingExtraError, OptionError, one_line
from ..training.config import RunConfig

# The share of the largest logit by which a model with a new adapter may differ from its base. Chosen.
SAME = 1e-3


def from_trl(recipe: str, *names: str, module: str = "trl") -> list[Any]:
    """Get some of trl's classes, and `datasets.Dataset`; `MissingExtraError` without these packages."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO is under trl.experimental
    try:
        from datasets import Dataset

        found = import_module(module)
        return [*(getattr(found, name) for name in names), Dataset]
    except ImportError as error:
        raise MissingExtraError(
            f"recipe {recipe}: cannot import trl, which trains language models ({error}). "
            f"Run: pip install 'spectune[llm]'"
        ) from None


def trl_trainer(kind: type[Any], arguments: Any, *, model: Any, **more: Any) -> Any:
    """Get a trainer of trl; the trained numbers keep their dtype, and `OptionError` for what trl refuses."""
    numbers = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        with _base_as_reference(model):
            trainer = kind(model=model, args=arguments, **more)
    except (ValueError, NotImplementedError) as error:
        raise OptionError(f"training: trl refuses this run: {one_line(error)}.") from error
    for parameter, kept in numbers:  # trl rounds an adapter beside a quantised base to bfloat16
        parameter.data = kept.to(parameter.device)
    return trainer


@contextmanager
def _base_as_reference(model: Any) -> Iterator[None]:
    """Keep trl from copying the adapter as a second one named "ref".

    Without this copy, its reference is the base with the adapter off: bit for bit the frozen weights. The copy would
    cost the adapter's memory again and be saved in every checkpoint.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    own = model.get_parameter
    model.add_adapter = lambda name, config: None
    model.get_parameter = lambda name: own(name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


@cache
def on_tokens(kind: type[Any]) -> Any:
    """Get a trainer of trl that takes rows of tokens as they are, without its own chat templates and tokenising."""

    def as_it_is(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def tokens_at(self: Any, prompts: list[str]) -> Any:
        return [self.asked[int(place)] for place in prompts], None, {}

    def sampler(self: Any, *args: Any) -> Any:
        found = kind._get_train_sampler(self, *args)
        if hasattr(found, "mini_repeat_count"):  # GRPO's
            found.__class__ = _by_epoch(type(found), self)
        return found

    more = {"_tokenize_prompts": tokens_at, "_get_train_sampler": sampler}
    return type(kind.__name__, (kind,), {"_prepare_dataset": as_it_is, "tokenize_row": as_it_is, **more})


def _by_epoch(kind: type[Any], trainer: Any) -> type[Any]:
    """Get a sampler whose order follows from seed and epoch.

    GRPO's own shuffles on from wherever its generator is: a resumed run would begin with the first order again.
    """

    def from_epoch(self: Any) -> Iterator[int]:
        self.generator.manual_seed(trainer.args.seed + int(trainer.state.epoch or 0))
        return iter(kind.__iter__(self))

    return type(kind.__name__, (kind,), {"__iter__": from_epoch})


def dropout_of(config: RunConfig) -> str | None:
    """Get the adapter's first option that asks for dropout, as `name=value`."""
    asked = [(name, value) for options in config.adapters for name, value in options.items() if "dropout" in name]
    return next((f"{name}={value}" for name, value in asked if value), None)


@torch.no_grad()
def refuse_moved(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Raise `OptionError` for a new adapter that already changes the model: the base would be another reference."""
    device, trained = next(model.parameters()).device, model.training
    model.eval()
    given = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    with_it = model(**given).logits
    with model.disable_adapter():
        without = model(**given).logits
    model.train(trained)
    if (with_it - without).abs().max() > SAME * without.abs().max():
        raise OptionError(
            "adapter: with this adapter the model does not start at its base, which is the reference here. "
            "Choose one that starts at zero, such as any method of spectune, or LoRA without init_lora_weights."
        )

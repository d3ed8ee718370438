"""The same batch through a model with the adapter's own update and with the factors of a LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter import SpectralModule, in_eval_mode
from ..errors import ExportError
from .layers import inner_model

SEED = 0
# One short sequence shows every layer; more than one would need padding rules. Chosen, not measured.
TOKENS = 16
# What the layers after an adapted one may amplify of its rounding. Chosen; the tests measure under 1.
AMPLIFICATION = 4

FactorsByModule = Mapping[SpectralModule, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LogitProof:
    """The largest difference in the model's output, or why it was not measured."""

    error: float | None = None
    """max |difference|."""
    largest: float | None = None
    """max |logit|."""
    tolerance: float | None = None
    """The largest difference that roundoff explains, as a fraction of max |logit|."""
    layers_run: int = 0
    """How many adapted layers the batch reached."""
    skipped: str | None = None
    """Why nothing was measured; None when it was."""


def compare_logits(
    model: nn.Module,
    adapter_name: str,
    factors: FactorsByModule,
    inputs: Mapping[str, Any] | torch.Tensor | None,
    exact: bool = True,
) -> LogitProof:
    """Get the largest difference of the logits; `ExportError` when it is more than roundoff.

    Without `inputs` a seeded random batch is built from the model's config; if none can be built,
    or the model does not run on it, the proof says so.
    """
    batch = random_batch(model) if inputs is None else inputs
    if isinstance(batch, str):
        return LogitProof(skipped=batch)
    with torch.no_grad(), _only_adapter(model, adapter_name):
        try:
            ours = _logits(model, batch)
        except Exception as error:
            # Any model's own code runs here. On a batch of ours it may fail for reasons of its own.
            if inputs is not None:
                raise
            return LogitProof(skipped=f"{type(model).__name__} does not run on a random batch: {error}")
        with _replaced_updates(factors) as run:
            theirs = _logits(model, batch)
    if not run:
        return LogitProof(skipped="the batch did not reach any adapted layer")
    return _judge(ours, theirs, {module: factors[module] for module in run}, exact)


def random_batch(model: nn.Module) -> dict[str, torch.Tensor] | str:
    """Get a small seeded batch that the model accepts, or the reason why there is none."""
    inner: Any = inner_model(model)
    config = getattr(inner, "config", None)
    kind = type(inner).__name__
    wanted = getattr(inner, "main_input_name", None)
    if config is None or wanted not in ("input_ids", "pixel_values"):
        return f"no random batch can be made for {kind} (main input: {wanted}); pass inputs"
    generator = torch.Generator().manual_seed(SEED)
    parameter = next(inner.parameters())
    if wanted == "pixel_values":
        size = getattr(config, "image_size", None)
        sides = (size, size) if isinstance(size, int) else size
        if not sides:
            return f"the config of {kind} does not give the image size; pass inputs"
        pixels = torch.randn(1, getattr(config, "num_channels", 3), *sides, generator=generator)
        return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        return f"the config of {kind} does not give the vocabulary size; pass inputs"
    names = ["input_ids", *(["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else [])]
    return {name: torch.randint(vocabulary, (1, TOKENS), generator=generator).to(parameter.device) for name in names}


def _judge(ours: torch.Tensor, theirs: torch.Tensor, factors: FactorsByModule, exact: bool) -> LogitProof:
    widest = max(A_PI.shape[1] for _, A_PI in factors.values())
    stored = max(torch.finfo(A_PI.dtype).eps for _, A_PI in factors.values())
    # Each adapted layer's sum of I terms is accumulated in float32 (sqrt(I) roundings in random directions)
    # and rounded once to the model's dtype, from factors rounded once to the file's; the L layers add up
    # as a random walk, sqrt(L).
    once = max(stored, torch.finfo(ours.dtype).eps)
    single = torch.finfo(torch.float32).eps
    tolerance = AMPLIFICATION * math.sqrt(len(factors)) * (once + math.sqrt(widest) * single)
    error, largest = float((ours.double() - theirs.double()).abs().max()), float(ours.abs().max())
    if exact and not error <= tolerance * largest:
        raise ExportError(
            f"logits: the exported LoRA differs by {error:.1e} (max |logit| is {largest:.1e}), more than roundoff "
            f"explains ({tolerance * largest:.1e}). Every layer agrees, so this model amplifies roundoff (routing, "
            "sampling); pass check_logits=False to skip this comparison."
        )
    return LogitProof(error, largest, tolerance, len(factors))


def _logits(model: nn.Module, batch: Mapping[str, Any] | torch.Tensor) -> torch.Tensor:
    output = model(batch) if isinstance(batch, torch.Tensor) else model(**batch)
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    logits: torch.Tensor = output[0] if found is None else found
    return logits


@contextmanager
def _replaced_updates(factors: FactorsByModule) -> Iterator[set[SpectralModule]]:
    """Replace every update by B A x; get the set of modules that were run."""
    run: set[SpectralModule] = set()

    def by_factors(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, SpectralModule)
        run.add(module)
        B_OP, A_PI = (factor.to(args[0].dtype) for factor in factors[module])
        return F.linear(F.linear(args[0], A_PI), B_OP)

    hooks = [module.register_forward_hook(by_factors) for module in factors]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Run with only this adapter, in eval mode; everything is restored afterwards.

    Not through `set_adapter`, which also changes what is trainable.
    """
    layers = [m for m in model.modules() if "_active_adapter" in vars(m) and "_disable_adapters" in vars(m)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(_active_adapter=[adapter_name], _disable_adapters=False)
        with in_eval_mode(model):
            yield
    finally:
        for layer, active, disabled in before:
            vars(layer).update(_active_adapter=active, _disable_adapters=disabled)

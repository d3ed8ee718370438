"""How the rules run in any optimizer's step: one hook for all modules that use them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapter import Dynamics, SpectralModule, modules_with_dynamics, spectral_modules
from ..errors import OptionError, nearest
from .rules import GRADIENT_NORMS, decay_by_spectrum, normalise_gradients

_watching = False


def attach_dynamics(
    optimizer: Optimizer, model: nn.Module, *, singular_decay: float = 0.0, grad_norm: str | None = None
) -> int:
    """Apply the rules at each step of the optimizer, and get the number of spectral modules that follow them.

    `singular_decay` and `grad_norm` in a `SpectralConfig` do the same without this call. The rules run
    right before the optimizer's own step: after gradient accumulation, synchronisation, unscaling and
    clipping, and not at all when a scaler skips the step.

    Raises `OptionError` for an unknown norm, a model without spectral adapters, or an optimizer that
    decays the same numbers a second time.
    """
    if grad_norm is not None and grad_norm not in GRADIENT_NORMS:
        raise OptionError(f"unknown grad_norm={grad_norm!r}. {nearest(grad_norm, list(GRADIENT_NORMS))}")
    modules = [module for _, _, module in spectral_modules(model)]
    if not modules:
        raise OptionError("attach_dynamics: the model has no spectral adapter. Attach one first.")
    for module in modules:
        module.dynamics = Dynamics(singular_decay, grad_norm)
        _refuse_second_decay(optimizer, module)
    watch_every_optimizer()
    return len(modules)


def watch_every_optimizer() -> None:
    """Make every optimizer step apply the rules to modules that use them; a second call does nothing.

    A hook on all optimizers instead of one, because Trainer and accelerate create theirs out of the
    user's sight, and an option of a config must never be silently ignored.
    """
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_before_step)
        _watching = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    wanting = list(modules_with_dynamics())
    if not wanting:
        return
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for module in wanting:
        held = [p for p in module.parameters() if id(p) in rates and p.grad is not None]
        if not held:
            continue
        if module.dynamics.grad_norm is not None:
            normalise_gradients(module, module.dynamics.grad_norm)
        if module.dynamics.singular_decay > 0:
            _refuse_second_decay(optimizer, module)
            decay_by_spectrum(module, rates, module.dynamics.singular_decay)


def _refuse_second_decay(optimizer: Optimizer, module: SpectralModule) -> None:
    if module.dynamics.singular_decay == 0:
        return
    if not module.method.decay_profile(module.spectrum, module.frozen):
        raise OptionError(
            f"{module.name}: singular_decay={module.dynamics.singular_decay} needs singular directions, and "
            f"{module.method.name} has none. Use the optimizer's weight_decay."
        )
    own = {id(p) for p in module.parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) and any(id(p) in own for p in group["params"]):
            raise OptionError(
                f"{module.name}: singular_decay={module.dynamics.singular_decay} and the optimizer's weight_decay="
                f"{group['weight_decay']} would decay the same numbers twice. Set weight_decay to 0."
            )

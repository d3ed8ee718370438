"""Rules for trained numbers at an optimizer's step: one hook on all optimizers.

The hook is set when the first module has rules, and finds all such modules. It is in this room because the rules are
a property of the module: a copied or unpickled one sets the hook again, in a process where nothing was attached.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import OptionError
from .rules import decay_by_spectrum, normalise_gradients

if TYPE_CHECKING:
    from .modules import SpectralModule


@dataclass(frozen=True)
class Dynamics:
    """The rules for one module's numbers at each optimizer step; none by default."""

    singular_decay: float = 0.0
    grad_norm: str | None = None

    def __bool__(self) -> bool:
        return self.singular_decay > 0 or self.grad_norm is not None


# In the order of creation, which is the same in every process: the norm of a sharded gradient is a collective, and in
# the order of a WeakSet (of addresses) processes would add up gradients of different layers.
_asking: weakref.WeakKeyDictionary[SpectralModule, None] = weakref.WeakKeyDictionary()
_watching = False
_once = threading.Lock()


def follow(module: SpectralModule) -> None:
    """Make every optimizer's step follow the dynamics of a module, or leave the module alone if it has none."""
    if module.dynamics:
        _asking[module] = None
        _watch_every_optimizer()
    else:
        _asking.pop(module, None)


def _watch_every_optimizer() -> None:
    """Set the hook, once.

    On all optimizers, because Trainer and accelerate create theirs out of the user's sight, and an option of a config
    must never be silently dropped. torch calls such hooks at each step, so existing optimizers follow, too.
    """
    global _watching
    with _once:
        if not _watching:
            register_optimizer_step_pre_hook(_before_step)
            _watching = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    asking = list(_asking)
    if not asking:
        return
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for module in asking:
        held = [p for p in module.parameters() if id(p) in rates and p.grad is not None]
        if not held:
            continue
        if module.dynamics.grad_norm is not None:
            normalise_gradients(module, module.dynamics.grad_norm)
        if module.dynamics.singular_decay > 0:
            refuse_second_decay(optimizer, module)
            decay_by_spectrum(module, rates, module.dynamics.singular_decay)


def refuse_second_decay(optimizer: Optimizer, module: SpectralModule) -> None:
    """Raise `OptionError` if singular_decay has no directions to guide it, or the optimizer decays the same numbers."""
    if module.dynamics.singular_decay == 0:
        return
    if not module.method.decay_profile(module.spectrum, module.frozen):
        raise OptionError(
            f"{module.name}: singular_decay={module.dynamics.singular_decay} needs singular directions, and "
            f"{module.method.name} has none. Use the optimizer's weight_decay."
        )
    if module.method.shared_by() == "kind":
        raise OptionError(
            f"{module.name}: singular_decay={module.dynamics.singular_decay} goes by the directions of one weight, and "
            f"with share='kind' several weights train the same numbers. Use the optimizer's weight_decay."
        )
    own = {id(p) for p in module.parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) and any(id(p) in own for p in group["params"]):
            raise OptionError(
                f"{module.name}: singular_decay={module.dynamics.singular_decay} and the optimizer's weight_decay="
                f"{group['weight_decay']} would decay the same numbers twice. Set weight_decay to 0."
            )

"""`training.optimizer: muon`: steps of one size in the operator norm for the matrices of spectral adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..adapter import SpectralModule, spectral_modules
from ..errors import OptionError

MUON = "muon"
# Keller Jordan's (github.com/KellerJordan/Muon) and torch.optim.Muon's: coefficients whose five steps bring singular
# values between 1e-3 and 1 near one (0.7 to 1.2), momentum, and the guard against a gradient of zero.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95
TINY = 1e-7
# AdamW's, for what is not a matrix: torch's own defaults.
BETAS, EPSILON = (0.9, 0.999), 1e-8


class SpectralMuon(Optimizer):
    """Muon for the groups that have `sizes`, AdamW for the others.

    M <- M - rate * size * msign(momentum)

    msign(U diag(S) Vh) = U Vh: all singular values of a step are near one. Between frozen orthonormal factors
    |U C Vh| = |C| in every unitarily invariant norm, so this is the steepest descent on dW in the operator norm, and
    `rate` is the part of the weight's own size by which a step moves it: one rate for every rank, width and method.
    Where a trained matrix multiplies another one, `size` is one, and the same holds to first order.

    Muon (Jordan et al., 2024; Nesterov momentum 0.95, decoupled weight decay) as in `torch.optim.Muon`, which needs
    torch 2.9, steps by the shape of a matrix and orthogonalises in bfloat16: here in float32.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 1e-3, "weight_decay": 0.0, "sizes": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            sizes = group["sizes"] or [None] * len(group["params"])
            for parameter, size in zip(group["params"], sizes, strict=True):
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                gradient, state = parameter.grad.float(), self.state[parameter]
                change = _adam(gradient, state) if size is None else _muon(gradient, state).mul_(size)
                parameter.add_(change.to(parameter.dtype), alpha=-group["lr"])
        return loss


def _muon(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
    return orthogonalised(gradient.lerp(momentum, MOMENTUM))


def _adam(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
    state["step"] += 1
    mean = state["mean"].lerp_(gradient, 1 - BETAS[0])
    square = state["square"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    first, second = (1 - beta ** state["step"] for beta in BETAS)
    return (mean / first) / ((square / second).sqrt() + EPSILON)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Get nearly U Vh of a matrix U diag(S) Vh: five Newton-Schulz steps, so singular values of 0.7 to 1.2.

    Those below about a thousandth of the Frobenius norm stay smaller, and a matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide / torch.linalg.matrix_norm(wide).clamp_min(TINY)
    for _ in range(STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found if wide is matrix else found.T


def refuse_without_matrices(model: nn.Module) -> None:
    """Raise `OptionError` where muon has nothing to orthogonalise: no spectral adapter, or one of single numbers."""
    modules = [module for _, _, module in spectral_modules(model)]
    if not modules:
        raise OptionError(
            f"training.optimizer={MUON}: this run has no adapter of spectune's, and {MUON} trains matrices between "
            f"singular directions. Choose a method, or optimizer: adamw_torch."
        )
    for module in modules:
        if not module.method.matrix_steps():
            raise OptionError(
                f"training.optimizer={MUON}: {module.method.name} with these options trains single numbers and no "
                f"matrix. Use svft with pattern: dense, another method, or optimizer: adamw_torch."
            )


def muon_groups(
    model: nn.Module,
    rates: Sequence[tuple[Sequence[nn.Parameter], float]],
    decayed: set[int],
    decay: float,
    rest: float,
) -> list[dict[str, Any]]:
    """Get the groups of a `SpectralMuon`: matrices of spectral adapters with their sizes, then everything else.

    `decayed` are the ids of the parameters with weight decay; `rest` is the rate of what an adapter trains besides
    matrices (gates, biases).
    """
    refuse_without_matrices(model)
    sizes = {id(p): size for _, _, module in spectral_modules(model) for p, size in _sizes(module)}
    groups = []
    for parameters, rate in rates:
        adapter = any(id(p) in sizes for p in parameters)
        for decays in (True, False):
            part = [p for p in parameters if (id(p) in decayed) == decays]
            matrices = [p for p in part if id(p) in sizes]
            others = [p for p in part if id(p) not in sizes]
            told = {"weight_decay": decay if decays else 0.0}
            if matrices:
                groups.append(told | {"params": matrices, "lr": rate, "sizes": [sizes[id(p)] for p in matrices]})
            if others:
                groups.append(told | {"params": others, "lr": rest if adapter else rate})
    return groups


def _sizes(module: SpectralModule) -> Iterable[tuple[nn.Parameter, float]]:
    """Get a module's own matrices, and the size that a step in each is a part of."""
    steps = module.method.matrix_steps()
    for name in module.own_names:
        if name in steps:
            yield getattr(module, name), module.weight_size() if steps[name] == "weight" else 1.0

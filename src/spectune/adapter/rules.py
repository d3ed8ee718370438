"""SpecAdapt's two rules, for every method: gradient normalisation and singular-guided decay of one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .modules import SpectralModule

Axes = int | tuple[int, ...]


def _rms(grad: torch.Tensor, axis: Axes) -> torch.Tensor:
    return grad / grad.square().mean(axis, keepdim=True).sqrt().clamp_min(_tiny(grad))


def _layer(grad: torch.Tensor, axis: Axes) -> torch.Tensor:
    centred = grad - grad.mean(axis, keepdim=True)
    return centred / centred.square().mean(axis, keepdim=True).sqrt().clamp_min(_tiny(grad))


def _tiny(grad: torch.Tensor) -> float:
    # Only for a gradient of exactly zero. The official code adds 1e-8 under the root, so that it does not normalise a
    # gradient of rms below 1e-4 but divides it by 1e-4 (benchmarks/results/grad_norm.json).
    return torch.finfo(grad.dtype).tiny


GRADIENT_NORMS: dict[str, Callable[[torch.Tensor, Axes], torch.Tensor]] = {"rms": _rms, "layer": _layer}
"""`rms`: g / sqrt(mean g^2). `layer`: (g - mean g) / deviation. Along the method's axis."""


@torch.no_grad()
def normalise_gradients(module: SpectralModule, kind: str) -> None:
    """Replace the gradients of one module by their normalised form, in place.

    One norm for each inner rank (specadapt's A and B) or direction (spectral_a), along the other axis;
    one norm for a whole vector or dense core. H, gates and scales keep their gradients.

    SpecAdapt, gradient normalisation (official code, `grad_norm`).
    """
    for name, axis in module.method.gradient_axes().items():
        gradient = getattr(module, name).grad if name in module.own_names else None
        if gradient is not None:
            gradient.copy_(GRADIENT_NORMS[kind](gradient, axis))


@torch.no_grad()
def decay_by_spectrum(module: SpectralModule, learning_rates: dict[int, float], decay: float) -> None:
    """Shrink every trained number of one module by the weakness of its direction, in place.

    a_i <- a_i (1 - lr decay (1 - s_i / s_max)):   no decay at the strongest direction, full in the tail.
    `decay` is per step and unit of learning rate (the official code's extra_decay times weight_decay,
    0.39 with its defaults 1.3 and 0.3). `learning_rates` maps id(parameter) to its group's rate;
    parameters outside the optimizer are left alone.

    SpecAdapt, singular-guided weight decay (official code), applied once: it decays a second time
    through AdamW's own weight_decay, which pulls H towards zero.
    """
    for name, profile in module.method.decay_profile(module.spectrum, module.frozen).items():
        parameter = getattr(module, name)
        rate = learning_rates.get(id(parameter))
        if rate is not None:
            parameter.mul_(_beside((1 - rate * decay * profile).to(parameter.dtype), parameter))


def _beside(factor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Get a factor that can multiply a sharded parameter (FSDP2); every process has all of it."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return factor
    from torch.distributed.tensor import DTensor, Replicate

    whole: torch.Tensor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole

"""Training in half precision, with a scaler that skips steps, and with recomputed activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectune import SpectralConfig
from spectune.methods import METHODS
from tests.models import MODELS

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "spectral_a": {"r": 4},
    "spectral_r": {"r": 4},
    "svft": {"pattern": "banded"},
    "specadapt": {"r": 4},
    "one_sided": {"r": 4},
    "svdiff": {},
    "lidb": {"r": 4},
    "orthogonal_adaptation": {"r": 4},
}
STEPS = 12


def tuned(method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    tiny = MODELS["llama"]
    config = SpectralConfig(method=method, target_modules=list(tiny.targets), **METHOD_OPTIONS[method])
    return get_peft_model(tiny.fresh().to(dtype), config)


def loss_of(model: nn.Module) -> torch.Tensor:
    inputs = MODELS["llama"].inputs()
    return model(**inputs, labels=inputs["input_ids"]).loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, rate: float, autocast: torch.dtype | None = None, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model), lr=rate, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_every_method_is_tried() -> None:
    assert METHOD_OPTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_autocast_learns_what_float32_learns(method: str, autocast: torch.dtype) -> None:
    """The loss falls by the same amount, up to the rounding of half precision in the loss itself."""
    rate = METHODS[method].learning_rate
    exact, rounded = train(tuned(method), rate), train(tuned(method), rate, autocast)
    gained = exact[0] - exact[-1]
    assert gained > 0.003
    # bfloat16 keeps 8 binary digits: a loss of 4 is rounded by up to 2^-7 on its way through the logits.
    assert abs((rounded[0] - rounded[-1]) - gained) < 0.15 * gained + 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_half_precision_base_trains_float32_numbers(method: str, dtype: torch.dtype) -> None:
    """Steps of 1e-5 would vanish in bfloat16 numbers of size 0.1; PEFT lifts them to float32, and they move."""
    model = tuned(method, dtype)
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    before = [parameter.detach().clone() for parameter in trained(model)]
    losses = train(model, 1e-5, steps=2)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(old, new) for old, new in zip(before, trained(model), strict=True))


def test_skipped_steps_leave_the_numbers_alone_and_training_goes_on() -> None:
    """GradScaler starts too high for float16 on purpose: it finds infinity, skips, and halves until it fits."""
    model = tuned("spectral_a")
    optimizer = torch.optim.AdamW(trained(model), lr=2e-3)
    # From float32's largest power of two, so that the first steps overflow, and down in strides.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-12)
    skipped = moved = 0
    model.train()
    for _ in range(40):
        before = [parameter.detach().clone() for parameter in trained(model)]
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model)
        old_scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(old, new) for old, new in zip(before, trained(model), strict=True))
        assert same == (scaler.get_scale() < old_scale)
        skipped, moved = skipped + same, moved + (not same)
    assert skipped >= 5 and moved >= 5
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trained(model))


def test_a_skipped_step_skips_the_dynamics_too() -> None:
    """Singular-guided decay acts at the optimizer's step: where the scaler makes none, nothing decays."""
    tiny = MODELS["llama"]
    config = SpectralConfig(r=4, target_modules=list(tiny.targets), singular_decay=0.5, grad_norm="rms")
    model = get_peft_model(tiny.fresh(), config)
    with torch.no_grad():
        for parameter in trained(model):
            parameter += 0.1
    before = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model)).backward()
    trained(model)[0].grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, trained(model), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_give_the_same_gradients(method: str, reentrant: bool) -> None:
    """Gradient checkpointing runs the forward twice; the update has no state that the second run would miss."""
    gradients = []
    for checkpointing in (False, True):
        model = tuned(method)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in trained(model):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        loss_of(model).backward()
        gradients.append([parameter.grad for parameter in trained(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        # The reentrant kind adds the branches of a block's gradient in another order: one roundoff, no more.
        assert torch.equal(plain, recomputed) or (reentrant and torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6))


def test_clipping_sees_every_trained_number() -> None:
    model = tuned("spectral_r")
    loss_of(model).backward()
    norm = torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
    left = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained(model)]))
    assert norm > 1e-3 and float(left) == pytest.approx(1e-3, rel=1e-3)

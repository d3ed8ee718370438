"""The denoising loss of a concept and its class, and the error on held-out pictures, whose noise is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import nn

from .model import ConceptModel

Batch = dict[str, torch.Tensor]
# Noise levels for each held-out picture, spread evenly. Chosen, not measured.
LEVELS = 8
# The noise of held-out pictures is the same in every run, so that figures are comparable.
HELD_OUT_SEED = 0


def denoising_loss(
    model: ConceptModel, seed: int, prior_weight: float, snr_gamma: float | None
) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """Get the loss of a batch: mean squared error of the concept + prior_weight * that of its class.

    The pipeline's scheduler decides what the error is of (noise, velocity, the clean latents). Noise and levels come
    from the model's own generator, which starts from the seed, or from the batch (`noise`, `t`).
    """
    chance, levels = model.noise.manual_seed(seed), model.noise_levels

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        latents, tokens, weights = batch["latents"], batch["tokens"], batch["weights"]
        shares = torch.ones(len(latents), device=latents.device)
        if "prior_latents" in batch:
            latents = torch.cat([latents, batch["prior_latents"]])
            tokens = torch.cat([tokens, batch["prior_tokens"]])
            weights = torch.cat([weights, torch.ones_like(weights)])
            shares = torch.cat([shares, prior_weight * shares])
        if "noise" in batch:
            noise, t = batch["noise"], batch["t"]
        else:
            noise = torch.randn(latents.shape, generator=chance).to(latents.device)
            t = torch.randint(levels.config.num_train_timesteps, (len(latents),), generator=chance).to(latents.device)
        errors = _errors(levels, module, latents, noise, t, tokens, weights)
        if snr_gamma is not None:
            errors = errors * _min_snr(levels, t, snr_gamma)
        # Divided only by the number of the concept's pictures: DreamBooth adds the two means.
        return (errors * shares).sum() / len(batch["latents"])

    return loss


def with_fixed_noise(rows: Sequence[dict[str, Any]], levels: Any) -> list[dict[str, Any]]:
    """Get each held-out picture at `LEVELS` noise levels, with noise that is the same in every run."""
    chance = torch.Generator("cpu").manual_seed(HELD_OUT_SEED)
    steps = levels.config.num_train_timesteps
    return [
        {**row, "noise": torch.randn(row["latents"].shape, generator=chance), "t": (2 * i + 1) * steps // (2 * LEVELS)}
        for row in rows
        for i in range(LEVELS)
    ]


@torch.no_grad()
def held_out_error(model: ConceptModel, batches: Sequence[Batch]) -> float:
    """Get the mean squared error over all rows of `with_fixed_noise`; no weighting of levels."""
    was_training = model.training
    model.eval()
    device, names = next(model.unet.parameters()).device, ("latents", "noise", "t", "tokens", "weights")
    found = [
        _errors(model.noise_levels, model, *(batch[name].to(device) for name in names)).double().cpu()
        for batch in batches
    ]
    model.train(was_training)
    return float(torch.cat(found).mean())


def _errors(
    levels: Any,
    module: nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Get the mean squared error of each row."""
    found = module(levels.add_noise(latents, noise, t), t, tokens)
    squares: torch.Tensor = (found - _target(levels, latents, noise, t)).square() * weights
    return squares.mean((1, 2, 3))


def _target(levels: Any, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    kind = levels.config.prediction_type
    if kind == "v_prediction":
        found: torch.Tensor = levels.get_velocity(clean, noise, t)
        return found
    return noise if kind == "epsilon" else clean


def _min_snr(levels: Any, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Get min(snr, gamma) as a weight of the error of the clean latents, turned into one of what is predicted."""
    snr: torch.Tensor = compute_snr(levels, t)
    kind = levels.config.prediction_type
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if kind == "v_prediction" else capped / snr if kind == "epsilon" else capped

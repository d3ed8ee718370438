"""What concept training optimises: a UNet, a text encoder and one word's embedding, and their denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from ..tuner import attach


class ConceptModel(nn.Module):
    """The parts of a pipeline that training runs through; only adapters and the new word's embedding are trained."""

    def __init__(self, pipeline: Any, unet_config: Any, text_config: Any, token_index: int | None) -> None:
        super().__init__()
        self._pipeline = [pipeline]  # in a list: it is no module of this one
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        self.unet: Any = pipeline.unet if unet_config is None else attach(pipeline.unet, unet_config)
        self.text_encoder: Any = pipeline.text_encoder
        if text_config is not None:
            self.text_encoder = attach(pipeline.text_encoder, text_config)
        pipeline.unet, pipeline.text_encoder = self.unet, self.text_encoder
        self.noise_levels = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.token: nn.Parameter | None = None
        if token_index is not None:
            self._give_word(token_index)

    def _give_word(self, index: int) -> None:
        """Train one row of the embedding table: it stands in a parameter of its own, put in where its id occurs."""
        table = self.text_encoder.get_input_embeddings()
        self.token = nn.Parameter(table.weight[index].detach().float().clone())

        def put_in(module: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
            assert self.token is not None
            return torch.where((args[0] == index)[..., None], self.token.to(found.dtype), found)

        table.register_forward_hook(put_in)

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Get what is trained of unet, text_encoder or token."""
        if part == "token":
            return [] if self.token is None else [self.token]
        return [parameter for parameter in getattr(self, part).parameters() if parameter.requires_grad]

    def trainable(self) -> dict[str, int]:
        """Get part -> how many numbers are trained."""
        counts = {part: sum(p.numel() for p in self.parameters_of(part)) for part in ("unet", "text_encoder", "token")}
        return {part: count for part, count in counts.items() if count}

    @contextmanager
    def drawing(self) -> Iterator[Any]:
        """Get the pipeline for drawing, as it is trained so far."""
        pipeline = self._pipeline[0]
        was_training = self.training
        self.eval()
        pipeline.vae.to(next(self.unet.parameters()).device)
        try:
            yield pipeline
        finally:
            self.train(was_training)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Get the UNet's answer for noisy latents (count, channels, height, width) at steps t."""
        hidden = self.text_encoder(tokens)[0]
        found: torch.Tensor = self.unet(noisy, t, encoder_hidden_states=hidden).sample
        return found.float()


def denoising_loss(
    model: ConceptModel, seed: int, prior_weight: float, snr_gamma: float | None
) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """Get the loss of a batch: mean squared error of the concept + prior_weight * that of its class.

    What the error is taken of (noise, velocity, the clean latents) is what the pipeline's scheduler says. Noise and
    levels come from a generator of the loss's own, so that drawing pictures between two steps changes nothing.
    """
    chance = torch.Generator("cpu").manual_seed(seed)
    levels = model.noise_levels

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        latents, tokens, weights = batch["latents"], batch["tokens"], batch["weights"]
        shares = torch.ones(len(latents), device=latents.device)
        if "prior_latents" in batch:
            latents = torch.cat([latents, batch["prior_latents"]])
            tokens = torch.cat([tokens, batch["prior_tokens"]])
            weights = torch.cat([weights, torch.ones_like(weights)])
            shares = torch.cat([shares, prior_weight * shares])
        noise = torch.randn(latents.shape, generator=chance).to(latents.device)
        t = torch.randint(levels.config.num_train_timesteps, (len(latents),), generator=chance).to(latents.device)
        found = module(levels.add_noise(latents, noise, t), t, tokens)
        errors = ((found - _target(levels, latents, noise, t)).square() * weights).mean((1, 2, 3))
        if snr_gamma is not None:
            errors = errors * _min_snr(levels, t, snr_gamma)
        # Divided by the concept's pictures alone: the two means are added, as DreamBooth does.
        return (errors * shares).sum() / len(batch["latents"])

    return loss


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

"""The base model: a Stable Diffusion in miniature (CLIP text encoder, UNet, autoencoder), trained from scratch."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .outlines import COLOURS, OUTLINES, Paint
from .scenes import SIZE, WORDS, Glyph, draw, make_images, random_prompt

SCENES = 12_000
# Chosen: after 4,500 steps of the denoiser 95 of 96 prompts came out right, after 3,000 (with that schedule) 68.
AUTOENCODER_STEPS, STEPS = 400, 4_500
BATCH = 32
# Tokens of the longest prompt: two glyphs of six words, "and", a start and an end, rounded up.
LONGEST = 16
LATENTS = 8
# What the last letter of a word bears in CLIP's vocabularies.
END = "</w>"
# One prompt in ten is left empty in training, which classifier-free guidance needs (arXiv 2207.12598).
DROPPED = 0.1
OnStep = Callable[[str, int, int, float], None]
"""Called with (stage, step, steps, loss)."""


def train_base(
    folder: Path,
    *,
    steps: int = STEPS,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    scenes: int = SCENES,
    seed: int = 0,
    on_step: OnStep = lambda stage, step, steps, loss: None,
) -> Path:
    """Train the base and save it as a diffusers pipeline folder. One seed gives one model on one machine."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    prompts = [random_prompt(chance) for _ in range(scenes)]
    pixels = as_pixels(make_images(prompts, seed))
    pipeline = fresh_pipeline()
    _train_autoencoder(pipeline.vae, as_pixels(_more_pictures(scenes // 2, chance)), autoencoder_steps, on_step)
    latents = _encode(pipeline.vae, pixels)
    pipeline.vae.register_to_config(scaling_factor=1 / float(latents.std()))
    latents = latents * pipeline.vae.config.scaling_factor
    _train_denoiser(pipeline, prompts, latents, steps, on_step)
    pipeline.save_pretrained(folder)
    return folder


def fresh_pipeline() -> StableDiffusionPipeline:
    """Get the untrained pipeline: about 1.5 million numbers."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=LATENTS,
        out_channels=LATENTS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENTS,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    _start_plain(vae)
    # Velocity and a schedule that ends in pure noise (arXiv 2305.08891): few steps then start where training ended.
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def _start_plain(vae: Any) -> None:
    """Start the autoencoder without its residual branches and with hardly any noise: it then learns in a minute."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    vae.quant_conv.weight[LATENTS:] = 0
    vae.quant_conv.bias[LATENTS:] = -8


def make_tokenizer() -> CLIPTokenizer:
    """Get a CLIP tokenizer whose vocabulary is the words of the prompts, one token each, and single letters."""
    letters = sorted({letter for word in WORDS for letter in word} | set("<>"))
    merges = _merges(sorted(set(WORDS)))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + END for letter in letters)]
    tokens = list(dict.fromkeys([*tokens, *("".join(pair) for pair in merges)]))
    with tempfile.TemporaryDirectory() as folder:
        vocab, written = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        written.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer(vocab=str(vocab), merges=str(written), model_max_length=LONGEST)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Get the merges of byte pair encoding that make each word one token: the most frequent pair first.

    Of equally frequent pairs the first in the alphabet; the trainer of tokenizers takes another one in each process.
    """
    split = [[*word[:-1], word[-1] + END] for word in words]
    merges = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in split:
            for place in range(len(parts) - 1):
                if tuple(parts[place : place + 2]) == best:
                    parts[place : place + 2] = ["".join(best)]
    return merges


def as_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Get pictures as one tensor (count, 3, height, width) from -1 to 1."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def _more_pictures(count: int, chance: random.Random) -> list[Image.Image]:
    """Get pictures of all outlines in any two colours: the autoencoder knows colours that the prompts never say."""
    found = []
    for _ in range(count):
        places = chance.choice([["on the left", "on the right"], ["in the middle"]])
        paints = [_random_paint(chance) for _ in places]
        found.append(draw([Glyph("", None, place) for place in places], chance, paints))
    return found


def _random_paint(chance: random.Random) -> Paint:
    outline = chance.choice([*OUTLINES.values(), [([(chance.random(), chance.random()) for _ in range(4)], 255)]])
    first, second = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    if chance.random() < 0.5:
        first = second = chance.choice(list(COLOURS.values()))
    cut, across = chance.uniform(0.2, 0.8), chance.random() < 0.5
    return Paint(outline, first, second, lambda x, y: (x if across else y) < cut)


def _train_autoencoder(vae: Any, pixels: torch.Tensor, steps: int, on_step: OnStep) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (BATCH,))]
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        # The weight of the KL term is Stable Diffusion's (arXiv 2112.10752): hardly more than a bound on the latents.
        loss = (rebuilt - batch).square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step("autoencoder", step + 1, steps, float(loss.detach()))


@torch.no_grad()
def _encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(500)])


def _train_denoiser(pipeline: Any, prompts: Sequence[str], latents: torch.Tensor, steps: int, on_step: OnStep) -> None:
    unet, text_encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    tokens = pipeline.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    trained = [*unet.parameters(), *text_encoder.parameters()]
    averages = [EMAModel(model.parameters(), decay=0.998) for model in (unet, text_encoder)]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        picked = torch.randint(len(latents), (BATCH,))
        shown = torch.where(torch.rand(BATCH) < DROPPED, len(prompts), picked)
        clean, noise = latents[picked], torch.randn_like(latents[picked])
        t = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        found = unet(noisy, t, encoder_hidden_states=text_encoder(tokens[shown]).last_hidden_state).sample
        # Min-SNR-5 (arXiv 2303.09556), in the form for velocity.
        snr = compute_snr(scheduler, t)
        loss = ((found - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        for average, model in zip(averages, (unet, text_encoder), strict=True):
            average.step(model.parameters())
        on_step("denoiser", step + 1, steps, float(loss.detach()))
    for average, model in zip(averages, (unet, text_encoder), strict=True):
        average.copy_to(model.parameters())

"""`ConceptOptions`: what a run of concept training is told."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError

ADAPTED = ("unet", "text_encoder")
"""What adapters stand on; each has a folder of this name in a concept's output."""


@dataclass(frozen=True, kw_only=True)
class ConceptOptions:
    """What a run of this recipe is told."""

    pipeline: Path
    """Folder of a diffusers pipeline with one UNet, one text encoder and an autoencoder."""
    images: Path
    """Folder with the pictures of the concept, with captions in metadata.jsonl or NAME.txt where they differ."""
    token: str | None = None
    """The new word, such as "<dog-a>"; None trains no word, and the captions use words that the base knows."""
    initial_word: str | None = None
    """The word that the new one starts from: its class, such as "dog"."""
    caption: str = "a {token}"
    """The caption of pictures without one of their own; {token} is the new word, in every caption and prompt."""
    masks: Path | None = None
    """Folder with NAME.png for every picture: white where the loss counts."""
    unet: Any = None
    """Adapter of the UNet: a `SpectralConfig` or any PEFT config; None leaves it alone."""
    text_encoder: Any = None
    """Adapter of the text encoder, likewise."""
    unet_rate: float | None = None
    """Learning rate of the UNet's adapter; None is the method's own."""
    text_encoder_rate: float | None = None
    """Learning rate of the text encoder's adapter; None is the method's own."""
    token_rate: float = 1e-3
    """Learning rate of the word's embedding; the Spectral Adapter's fusion experiments (arXiv 2405.13952) used this."""
    steps: int = 500
    batch_size: int = 2
    seed: int = 0
    prior_prompts: tuple[str, ...] = ()
    """Prompts of the concept's class, such as "a dog", whose pictures by the base are trained on as well."""
    prior_images: int = 32
    """How many of them are drawn before training."""
    prior_weight: float = 1.0
    """Weight of their loss; 1 is DreamBooth's."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the noise levels (arXiv 2303.09556; 5 is its value); None weighs them equally."""
    validation_prompts: tuple[str, ...] = ()
    validation_every: int = 100
    """Draw the validation prompts before training, every so many steps, and at the end, from the same noise."""
    sampling_steps: int = 20
    guidance: float = 7.5

    def __post_init__(self) -> None:
        if self.unet is None and self.text_encoder is None and self.token is None:
            raise OptionError("unet, text_encoder, token: nothing would be trained. Give one of them.")
        if (self.token is None) != (self.initial_word is None):
            raise OptionError(
                f"token={self.token!r}, initial_word={self.initial_word!r}: a new word starts from a known one. "
                f"Give both or neither."
            )
        for part in ADAPTED:
            if getattr(self, part) is None and getattr(self, f"{part}_rate") is not None:
                raise OptionError(f"{part}_rate={getattr(self, f'{part}_rate')}: no adapter of {part} is asked for.")
        for name in ("steps", "batch_size", "validation_every", "sampling_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        if self.prior_weight < 0:
            raise OptionError(f"prior_weight={self.prior_weight} must not be negative.")
        if self.prior_prompts and self.prior_images < 1:
            raise OptionError(
                f"prior_images={self.prior_images}: prior_prompts need at least 1. Leave them out for none."
            )
        if self.token is None and any("{token}" in prompt for prompt in self.validation_prompts):
            raise OptionError("validation_prompts: they hold {token}, but no token is trained. Give one.")

    def worded(self, text: str) -> str:
        """Get a caption or prompt with the new word in its place."""
        return text if self.token is None else text.replace("{token}", self.token)

    def to_json(self) -> dict[str, Any]:
        """Get the options as JSON holds them; an adapter's config as PEFT writes it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        configs = {part: getattr(self, part) for part in ADAPTED}
        plain |= {part: None if config is None else config.to_dict() for part, config in configs.items()}
        found: dict[str, Any] = json.loads(json.dumps(plain, default=_plain))
        return found


def _plain(value: Any) -> Any:
    """Get what JSON does not know (a set of target modules, a path) as what it does."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

"""`Examples`: the pictures and captions of a concept for training and measuring, and the prior drawn by the base."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from .config import ConceptConfig
from .data import read_shots, to_latents, to_weights
from .loss import with_fixed_noise
from .model import ConceptModel
from .pipeline import sample, side_of

PictureRow = dict[str, Any]


class Examples:
    """The pictures of a run, encoded once."""

    def __init__(self, config: ConceptConfig, model: ConceptModel) -> None:
        self.config, self.model = config, model
        self._prior: list[PictureRow] | None = None
        self._read = cache(self._read_split)

    def pictures(self, split: str) -> list[PictureRow]:
        """Get latents, tokens and weights of each picture."""
        return self._read(split)

    def held_out(self, split: str) -> list[PictureRow]:
        """Get the rows that a split is measured on."""
        return with_fixed_noise(self.pictures(split), self.model.noise_levels)

    def to_train(self) -> list[PictureRow]:
        """Get the training examples: each a picture of the concept and, with a prior, one of the class."""
        told, chance, pictures = self.config.training, random.Random(self.config.seed), self.pictures("train")
        if told.epochs is None:
            count = int(told.steps or 0) * told.batch_size * told.gradient_accumulation
        else:
            count = math.ceil(told.epochs * len(pictures))
        prior = self._prior_or_blank(pictures[0]["latents"])
        found = []
        for i in range(count):
            example = pictures[i % len(pictures)]
            if prior:
                other = chance.choice(prior)
                example = example | {"prior_latents": other["latents"], "prior_tokens": other["tokens"]}
            found.append(example)
        return found

    def draw_prior(self) -> None:
        """Draw the pictures of the class by the untouched base, as latents."""
        how = self.config.drawings
        options: dict[str, Any] = {"seed": self.config.seed, "steps": how.steps, "guidance": how.guidance}
        prompts = self._prior_prompts
        if not prompts:
            return
        with self.model.drawing(untouched=True) as pipeline:
            latents = sample(pipeline, prompts, output_type="latent", **options)
        pairs = zip(latents, prompts, strict=True)
        self._prior = [{"latents": x.float().cpu(), "tokens": self._tokens(prompt)} for x, prompt in pairs]

    def caption(self, place: int) -> list[tuple[str, bool]]:
        """Get the tokens of a training picture's caption, and whether the embedding of each is trained."""
        tokenizer, word = self.model.pipeline.tokenizer, self.config.word.token
        tokens = tokenizer.convert_ids_to_tokens(self.pictures("train")[place]["tokens"].tolist())
        end = tokens.index(tokenizer.eos_token) + 1
        said = [token.removesuffix("</w>") for token in tokens[:end]]
        return [piece for token in said for piece in ((token, token == word), (" ", False))]

    @property
    def _prior_prompts(self) -> list[str]:
        asked = self.config.prior
        count = asked.images if asked.prompts and asked.weight else 0
        return [asked.prompts[i % len(asked.prompts)] for i in range(count)]

    def _prior_or_blank(self, like: torch.Tensor) -> list[PictureRow]:
        """Get the pictures of the class; blank ones of the same size before they are drawn, as in `check`."""
        if self._prior is not None:
            return self._prior
        return [{"latents": torch.zeros_like(like), "tokens": self._tokens(prompt)} for prompt in self._prior_prompts]

    def _read_split(self, split: str) -> list[PictureRow]:
        data, pipeline = self.config.data, self.model.pipeline
        masks = Path(data.masks) if data.masks is not None and split == "train" else None
        shots = read_shots(Path(getattr(data, split)), data.caption, side_of(pipeline), masks)
        latents = to_latents(pipeline.vae, shots)
        captions = [self.config.worded(shot.caption) for shot in shots]
        self._refuse_wrong_words(f"data.{split}", captions)
        columns = zip(latents, captions, to_weights(shots, latents.shape[-1]), strict=True)
        return [{"latents": x, "tokens": self._tokens(c), "weights": w} for x, c, w in columns]

    def _refuse_wrong_words(self, where: str, captions: list[str]) -> None:
        word = self.config.word.token
        if word is not None and not any(word in caption for caption in captions):
            raise OptionError(
                f"{where}: no caption contains the new word {word!r}; the first is {captions[0]!r}. Write {{token}}."
            )
        if word is None and any("{token}" in caption for caption in captions):
            raise OptionError(
                f"{where}: {captions[0]!r} contains {{token}}, without a new word. Give word.token, or other captions."
            )

    def _tokens(self, caption: str) -> torch.Tensor:
        tokenizer = self.model.pipeline.tokenizer
        ids: torch.Tensor = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids[0]
        if len(ids) > tokenizer.model_max_length:
            raise OptionError(
                f"caption: {caption!r} has {len(ids)} tokens, more than the text encoder reads "
                f"({tokenizer.model_max_length}). Shorten it."
            )
        return ids

"""Alignment: how similar each region of a picture is to its references and its prompt, by CLIP or DINO.

Each region is cropped before it is scored: CLIP's preprocessing cuts a wide picture to its middle, which would leave
only fragments of the concepts at the sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..checkpoint import load_auto
from ..errors import DataError, OptionError, SpectuneError, one_line
from ..recipes.images import image_processor
from .data import Image

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
WITH_TEXT = ("clip",)
IMAGES_ONLY = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")


@dataclass(frozen=True)
class Region:
    """A part of a picture and what it should show."""

    box: Box = WHOLE
    """Left, top, right, bottom, as shares of width and height."""
    references: Sequence[Image.Image] = ()
    """Pictures of what it should show."""
    prompt: str | None = None
    """What it should show, in words."""

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise OptionError(f"region: {self.box} is not a box. Give left < right and top < bottom from 0 to 1.")
        if not self.references and self.prompt is None:
            raise OptionError(f"region {self.box}: has nothing to compare it with. Give references or a prompt.")


@dataclass(frozen=True)
class Alignment:
    """Mean cosines of one region, from -1 to 1; None without anything to compare with."""

    image: float | None
    """Over all pairs of a picture's crop and a reference."""
    text: float | None
    """Over the crops, with the prompt."""


class Encoder:
    """Pictures, and for CLIP also words, as vectors of length one."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any = None) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, tokenizer

    @torch.no_grad()
    def of_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Get one vector per picture; each is padded to a square first, so that nothing is cut off."""
        pixels = self.processor([_filled_up(image) for image in images], return_tensors="pt").pixel_values
        if self.tokenizer is not None:
            found = self.model.get_image_features(pixel_values=pixels)
            return _unit(getattr(found, "pooler_output", found))
        # The class token, which DINO's own evaluations compare.
        return _unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])

    @torch.no_grad()
    def of_text(self, prompt: str) -> torch.Tensor:
        """Get the vector of a prompt; `OptionError` for an encoder of pictures only."""
        if self.tokenizer is None:
            raise OptionError(
                f"prompt {prompt!r}: {self.model.config.model_type} reads only pictures. "
                f"Leave the prompt out, or use CLIP."
            )
        words = self.tokenizer([prompt], truncation=True, return_tensors="pt")
        found = self.model.get_text_features(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return _unit(getattr(found, "pooler_output", found))


def load_encoder(folder: str | Path) -> Encoder:
    """Get the CLIP, DINO or ViT of a local folder; `OptionError` for another kind of model, or none."""
    local = {"local_files_only": True}
    try:
        kind = load_auto(AutoConfig, folder, **local).model_type
        if kind in (*WITH_TEXT, *IMAGES_ONLY):
            model = load_auto(AutoModel, folder, use_safetensors=True, **local)
            tokenizer = load_auto(AutoTokenizer, folder, **local) if kind in WITH_TEXT else None
            return Encoder(model, image_processor(folder, **local), tokenizer)
    except SpectuneError:
        raise
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise OptionError(f"{folder}: cannot load an encoder: {reason}. Give a local folder.") from error
    known = ", ".join((*WITH_TEXT, *IMAGES_ONLY))
    raise OptionError(f"{folder}: a CLIP or DINO is needed, but this is {kind!r}. Give one of {known}.")


def alignment(images: Sequence[Image.Image], regions: Sequence[Region], encoder: Encoder) -> list[Alignment]:
    """Get the alignment of each region, over all pictures."""
    if not images:
        raise DataError("alignment: there are no pictures to score. Give at least one.")
    found = []
    for region in regions:
        crops_MD = encoder.of_images([crop(image, region.box) for image in images])
        image = text = None
        if region.references:
            image = float((crops_MD @ encoder.of_images(region.references).T).mean())
        if region.prompt is not None:
            text = float((crops_MD @ encoder.of_text(region.prompt).T).mean())
        found.append(Alignment(image, text))
    return found


def crop(image: Image.Image, box: Box) -> Image.Image:
    """Get the part of a picture inside a box of shares."""
    width, height = image.size
    left, top, right, bottom = box
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def _filled_up(image: Image.Image) -> Image.Image:
    """Get the picture in the middle of a square of its mean colour."""
    image = image.convert("RGB")
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)

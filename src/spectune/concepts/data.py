"""The few pictures of a concept with captions and perhaps masks, as latents for a UNet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError, MissingExtraError
from ..recipes.images import image_ops, upright_rgb

try:
    from PIL import Image as Image
except ImportError as error:  # pragma: no cover - the extra brings it
    raise MissingExtraError("text to image needs the package pillow. Run: pip install 'spectune[diffusion]'") from error

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Shot:
    """One picture of the concept: square, in the size of the pipeline."""

    image: Image.Image
    caption: str
    mask: Image.Image | None = None
    """White counts in the loss; grey counts in part."""


def read_shots(folder: Path, caption: str, side: int, masks: Path | None = None) -> list[Shot]:
    """Get the pictures of a folder with their captions, scaled to `side` on the short side and cut to the middle.

    A caption is in `metadata.jsonl` (`file_name` and `text` on each line, as in datasets' imagefolder), else in
    NAME.txt beside the picture, else it is `caption`. `masks` is a folder with NAME.png for every picture. `DataError`
    for a folder without pictures, a file that is not a picture, or a mask that is missing.
    """
    paths = picture_paths(folder)
    captions = _captions(Path(folder))
    for name in captions:
        if not any(path.name == name for path in paths):
            raise DataError(f"{folder}/metadata.jsonl: the file {name!r} does not exist. Add it or remove the line.")
    shots = []
    for path in paths:
        beside = path.with_suffix(".txt")
        said = captions.get(path.name) or (beside.read_text(encoding="utf-8").strip() if beside.is_file() else caption)
        mask = None if masks is None else _square(_open(masks / f"{path.stem}.png", "L"), side, Image.Resampling.BOX)
        shots.append(Shot(_square(_open(path, "RGB"), side), said, mask))
    return shots


def picture_paths(folder: Path) -> list[Path]:
    """Get the pictures of a folder in the order of their names; `DataError` if there is none."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise DataError(f"{folder}: contains no pictures of the concept. Put 3 to 10 PNG or JPEG files there.")
    return paths


def _captions(folder: Path) -> dict[str, str]:
    """Get file name -> caption from metadata.jsonl, if there is one."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None:
                found[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{i}: file_name and text are needed, but this is {line[:80]!r}. Write both."
            ) from error
    return found


def _open(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            # Masks lie over their pictures, so both are turned as EXIF says.
            return upright_rgb(image) if mode == "RGB" else image_ops().exif_transpose(image).convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot read this picture: {error}. Replace it or remove it.") from error


def _square(image: Image.Image, side: int, how: Any = Image.Resampling.LANCZOS) -> Image.Image:
    """Get the middle square; a picture is cut and never squashed, which would change the concept.

    Masks are scaled by averages: Lanczos would swing over their edges.
    """
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), how, box=(left, top, left + short, top + short))


@torch.no_grad()
def to_latents(vae: nn.Module, shots: list[Shot]) -> torch.Tensor:
    """Get the scaled latents (count, channels, height, width) of the pictures, on the CPU.

    The mode of the autoencoder's distribution, computed once: its spread is far below the noise that training adds.
    """
    model: Any = vae
    parameter = next(model.parameters())
    pixels = torch.cat([as_pixels(shot.image) for shot in shots]).to(parameter.device, parameter.dtype)
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in pixels.split(4)])
    return (latents * model.config.scaling_factor).float().cpu()


def to_weights(shots: list[Shot], side: int) -> torch.Tensor:
    """Get the weight of each latent (count, 1, side, side), with a mean of one per picture; ones without a mask."""
    weights = torch.ones(len(shots), 1, side, side)
    for i, shot in enumerate(shots):
        if shot.mask is not None:
            wide = as_pixels(shot.mask.convert("RGB"))[:, :1] / 2 + 0.5
            weights[i] = nn.functional.interpolate(wide, (side, side), mode="area")[0]
            if not weights[i].any():
                raise DataError(f"mask {i + 1} of {len(shots)}: is black, so nothing would be learned. Replace it.")
            weights[i] /= weights[i].mean()
    return weights


def as_pixels(image: Image.Image) -> torch.Tensor:
    """Get an RGB picture as (1, 3, height, width) from -1 to 1."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1

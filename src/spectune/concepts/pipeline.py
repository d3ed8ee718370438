"""A diffusers pipeline with concepts: opened from a folder, given new words and adapters, sampled with one seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint import save_tensors
from ..errors import AdapterError, MissingExtraError, OptionError, one_line
from ..training.loop import quiet_libraries
from ..tuner import load_attached, load_beside
from .config import ADAPTED
from .pipeline_index import refuse_foreign_code

try:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from PIL import Image
except ImportError as error:  # pragma: no cover - the extra brings it
    raise MissingExtraError(
        "text to image needs the packages diffusers and pillow. Run: pip install 'spectune[diffusion]'"
    ) from error

NEEDED = (*ADAPTED, "vae", "tokenizer", "scheduler")
TOKEN_FILE = "token.safetensors"
RUN_ADAPTER = "adapter"
"""The subfolder of a run that `load_concepts` reads."""
STEPS, GUIDANCE = 20, 7.5  # Stable Diffusion's usual guidance; 20 steps are enough for DDIM and DPM-Solver.


def open_pipeline(folder: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Get a diffusers pipeline of a folder or the hub; safetensors only. `OptionError` for one that cannot be trained.

    It is on the accelerator if there is one.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    quiet_libraries()
    refuse_foreign_code(Path(folder))
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, revision=revision
        )
    except Exception as error:  # diffusers checks little and can raise anything
        raise OptionError(
            f"model: cannot load {folder}: {one_line(error)}. Give a diffusers pipeline folder."
        ) from error
    missing = [name for name in NEEDED if getattr(pipeline, name, None) is None]
    second = [name for name in ("text_encoder_2", "text_encoder_3") if getattr(pipeline, name, None) is not None]
    if missing or second:
        found = f"no {', '.join(missing)}" if missing else f"a second text encoder ({', '.join(second)})"
        raise OptionError(
            f"model: {folder} is a {type(pipeline).__name__} with {found}. This recipe needs one UNet, one "
            f"text encoder and an autoencoder, as in Stable Diffusion 1 and 2."
        )
    pipeline.set_progress_bar_config(disable=True)
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        if part.dtype != dtype:
            part.to(dtype)
    return pipeline


def side_of(pipeline: Any) -> int:
    """Get the side of the pictures that the pipeline draws, in pixels."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def add_token(pipeline: Any, token: str, embedding: torch.Tensor) -> int:
    """Give the pipeline a new word with its embedding, and get the word's id; `OptionError` for a known word."""
    # A CLIP vocabulary has most words as "word</w>", which add_tokens would not recognise.
    known = len(pipeline.tokenizer(token, add_special_tokens=False).input_ids) == 1
    if known or pipeline.tokenizer.add_tokens(token) != 1:
        raise OptionError(
            f"word.token: the tokenizer already has the word {token!r}. Choose a new one, such as '<{token}>'."
        )
    text_encoder = pipeline.text_encoder
    table = text_encoder.get_input_embeddings().weight
    if embedding.shape != table.shape[1:]:
        raise AdapterError(
            f"token {token!r}: its embedding has the shape {tuple(embedding.shape)}, but this text encoder needs "
            f"{tuple(table.shape[1:])}. Use the pipeline that it was trained on."
        )
    index = int(pipeline.tokenizer.convert_tokens_to_ids(token))
    if index >= len(table):
        # Not the mean of the others, which is transformers' default: it would be overwritten at once.
        text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[index] = embedding.to(table.device, table.dtype)
    return index


def add_known_word(pipeline: Any, token: str, initial_word: str) -> int:
    """Give the pipeline a new word that starts from a known one, and get its id."""
    known = pipeline.tokenizer(initial_word, add_special_tokens=False).input_ids
    if len(known) != 1:
        raise OptionError(
            f"word.initial_word: {initial_word!r} must be one token, but is {len(known)}. Choose a common single word."
        )
    start = pipeline.text_encoder.get_input_embeddings().weight[known[0]].detach().clone()
    return add_token(pipeline, token, start)


def save_token(folder: Path, token: str, embedding: torch.Tensor) -> None:
    """Write a word's embedding in the format of textual inversion, for `pipeline.load_textual_inversion`, too."""
    save_tensors(folder / TOKEN_FILE, {token: embedding})


def load_concepts(pipeline: Any, folders: Sequence[str | Path]) -> Any:
    """Put trained concepts into a pipeline, in place: their words, and their adapters on UNet and text encoder.

    A folder is a run's, or any with `unet/`, `text_encoder/` or `token.safetensors`. Updates of several
    adapters are added. The models stay diffusers' and transformers' own classes.
    """
    places = [place for folder in folders for place in (Path(folder), Path(folder, RUN_ADAPTER)) if _holds(place)]
    for folder in map(Path, folders):
        if not _holds(folder) and not _holds(folder / RUN_ADAPTER):
            raise AdapterError(
                f"{folder}: not a concept: it has no {', '.join(ADAPTED)} or {TOKEN_FILE}. Check the path."
            )
    for place in places:
        if (place / TOKEN_FILE).exists():
            _load_token(pipeline, place / TOKEN_FILE)
    for part in ADAPTED:
        found = [folder / part for folder in places if (folder / part).exists()]
        if found:
            setattr(pipeline, part, _with_adapters(getattr(pipeline, part), found))
    return pipeline


def _holds(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*ADAPTED, TOKEN_FILE))


def _load_token(pipeline: Any, path: Path) -> None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: this is not a safetensors file: {error}. Train the concept again.") from error
    for token, embedding in tensors.items():
        add_token(pipeline, token, embedding)


def _with_adapters(model: Any, folders: Sequence[Path]) -> Any:
    """Get the bare model with all adapters active in it."""
    tuned: Any = load_attached(model, folders[0])
    names = ["default"]
    for i, folder in enumerate(folders[1:], 1):
        names.append(f"concept_{i}")
        load_beside(tuned, folder, names[-1])
    tuned.base_model.set_adapter(names)
    return tuned.get_base_model().eval()


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    output_type: str = "pil",
) -> list[Any]:
    """Get one picture per prompt. The i-th starts from the noise of seed + i, with any adapters and batch size.

    So pictures of two adapters differ only by the adapters. `output_type="latent"` gives scaled latents instead.
    """
    found: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        # On the CPU: another device would draw other noise from the same seed.
        noise = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        done = pipeline(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
            output_type=output_type,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(part),
        )
        found += list(done.images)
    return found


def contact_sheet(images: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Get pictures of one size on one sheet, row by row."""
    width, height = images[0].size
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * width, (i // columns) * height))
    return sheet

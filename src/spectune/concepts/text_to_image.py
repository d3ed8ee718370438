"""Text to image: a few pictures of a concept in, adapters (and a new word) out, on any Stable Diffusion folder.

DreamBooth's protocol (arXiv 2208.12242) with the new word of textual inversion (arXiv 2208.01618): the captions hold
the word, prompts of its class keep what the base knows, and only adapters and the word's embedding are trained.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ..checkpoint import fresh_folder, hold_folder, write_atomically
from ..errors import OptionError
from ..methods import METHODS
from ..training.fit import fit
from ..training.loop import OnStep
from ..training.rates import KNOWN
from .data import read_shots, to_latents, to_weights
from .loss import ConceptModel, denoising_loss
from .options import ADAPTED
from .options import ConceptOptions as ConceptOptions
from .pipeline import add_token, contact_sheet, open_pipeline, sample, save_token, side_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The attention of a UNet, as the papers adapt it."""
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]
"""The convolutions in the blocks of a UNet."""
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""The attention of a CLIP text encoder."""
RECORD = "concept.json"


@dataclass(frozen=True)
class ConceptRun:
    """A trained concept: the output folder, and what a report shows of the run."""

    output: Path
    """Holds unet/, text_encoder/ (adapters), token.safetensors, validation/step-N.png and concept.json."""
    options: ConceptOptions
    losses: list[float] = field(repr=False)
    trainable: dict[str, int]
    """Part (unet, text_encoder, token) -> how many numbers were trained."""
    validation: list[Path]
    """The sheets in the order of their steps; the first is the base with the new word untrained."""


def train_concept(
    options: ConceptOptions, output: str | Path, on_step: OnStep | None = None, say: Callable[[str], None] = print
) -> ConceptRun:
    """Train a concept into a new folder; `load_concepts` puts it into a pipeline.

    `OutputError` for a folder that holds something, `OptionError` and `DataError` before any training. Every file
    appears whole; `concept.json` is written last, so a folder without it is that of a run that did not end.
    """
    folder = Path(output)
    pipeline = open_pipeline(options.pipeline)
    rows = _rows(pipeline, options)
    with fresh_folder(folder):
        pass  # refused if it holds something; from here on its files appear one by one, so that a run can be watched
    with hold_folder(folder):
        return _train(options, folder, pipeline, rows, on_step, say)


def _train(
    options: ConceptOptions,
    folder: Path,
    pipeline: Any,
    rows: list[dict[str, Any]],
    on_step: OnStep | None,
    say: Callable[[str], None],
) -> ConceptRun:
    index = None if options.token is None else _new_word(pipeline, options)
    prior = _prior(pipeline, options)
    set_seed(options.seed)  # LoRA's A is random
    say(f"{len(rows)} pictures of the concept, {len(prior)} of its class")
    model = ConceptModel(pipeline, options.unet, options.text_encoder, index)
    watch = _Validation(model, options, folder, on_step, say)
    watch.draw(0)
    losses = fit(
        model,
        _examples(pipeline, rows, prior, options),
        torch.utils.data.default_collate,
        denoising_loss(model, options.seed, options.prior_weight, options.snr_gamma),
        steps=options.steps,
        batch_size=options.batch_size,
        rates=_rates(model, options),
        seed=options.seed,
        on_step=watch,
    )
    watch.draw(options.steps)
    _save(model, options, folder)
    run = ConceptRun(folder, options, losses, model.trainable(), watch.sheets)
    write_atomically(folder / RECORD, json.dumps(_record(run), indent=1) + "\n")
    return run


def _rows(pipeline: Any, options: ConceptOptions) -> list[dict[str, Any]]:
    """Get latents, caption and weights of each picture."""
    shots = read_shots(options.images, options.caption, side_of(pipeline), options.masks)
    latents = to_latents(pipeline.vae, shots)
    weights = to_weights(shots, latents.shape[-1])
    captions = [options.worded(shot.caption) for shot in shots]
    if options.token is not None and not any(options.token in caption for caption in captions):
        raise OptionError(
            f"caption: no caption holds the new word {options.token!r}; the first is {captions[0]!r}. Write {{token}}."
        )
    if options.token is None and any("{token}" in caption for caption in captions):
        raise OptionError(
            f"caption: {captions[0]!r} holds {{token}}, but no token is trained. Give one or other words."
        )
    return [{"latents": x, "caption": c, "weights": w} for x, c, w in zip(latents, captions, weights, strict=True)]


def _new_word(pipeline: Any, options: ConceptOptions) -> int:
    """Add the word, started from the known one, and get its id."""
    known = pipeline.tokenizer(options.initial_word, add_special_tokens=False).input_ids
    if len(known) != 1:
        raise OptionError(
            f"initial_word: {options.initial_word!r} is {len(known)} tokens, a new word starts from one. "
            f"Choose a common single word."
        )
    start = pipeline.text_encoder.get_input_embeddings().weight[known[0]].detach().clone()
    return add_token(pipeline, str(options.token), start)


def _prior(pipeline: Any, options: ConceptOptions) -> list[dict[str, Any]]:
    """Get pictures of the class by the untouched base, as latents."""
    if not options.prior_prompts or options.prior_weight == 0:
        return []
    prompts = [options.prior_prompts[i % len(options.prior_prompts)] for i in range(options.prior_images)]
    latents = sample(
        pipeline,
        prompts,
        seed=options.seed,
        steps=options.sampling_steps,
        guidance=options.guidance,
        output_type="latent",
    )
    return [{"latents": x.float().cpu(), "caption": c} for x, c in zip(latents, prompts, strict=True)]


def _examples(
    pipeline: Any, rows: list[dict[str, Any]], prior: list[dict[str, Any]], options: ConceptOptions
) -> list[dict[str, Any]]:
    """Get one example for each place in each batch: a picture of the concept and, with a prior, one of the class."""
    chance = random.Random(options.seed)
    tokens = {row["caption"]: _tokens(pipeline.tokenizer, row["caption"]) for row in [*rows, *prior]}
    found = []
    for i in range(options.steps * options.batch_size):
        row = rows[i % len(rows)]
        example = {"latents": row["latents"], "weights": row["weights"], "tokens": tokens[row["caption"]]}
        if prior:
            other = chance.choice(prior)
            example |= {"prior_latents": other["latents"], "prior_tokens": tokens[other["caption"]]}
        found.append(example)
    return found


def _tokens(tokenizer: Any, caption: str) -> torch.Tensor:
    ids = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids[0]
    if len(ids) > tokenizer.model_max_length:
        raise OptionError(
            f"caption: {caption!r} is {len(ids)} tokens, the text encoder reads "
            f"{tokenizer.model_max_length}. Shorten it."
        )
    return ids


def _rates(model: ConceptModel, options: ConceptOptions) -> list[tuple[list[nn.Parameter], float]]:
    groups = [(model.parameters_of("token"), options.token_rate)]
    for part in ADAPTED:
        config, asked = getattr(options, part), getattr(options, f"{part}_rate")
        if config is not None:
            groups.append((model.parameters_of(part), _rate(config, part) if asked is None else asked))
    return groups


def _rate(config: Any, part: str) -> float:
    """Get the usual rate of a method; `OptionError` where none is known."""
    method = str(getattr(config, "method", None) or getattr(config.peft_type, "value", config.peft_type))
    rate = METHODS[method].learning_rate if method in METHODS else getattr(KNOWN.get(method), "usual", None)
    if rate is None:
        raise OptionError(f"{part}_rate: no rate is known for {method}. Give one.")
    return float(rate)


class _Validation:
    """Draws the validation prompts at the steps that are due, and passes every step on."""

    def __init__(
        self,
        model: ConceptModel,
        options: ConceptOptions,
        folder: Path,
        on_step: OnStep | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.options, self.folder, self.on_step, self.say = model, options, folder, on_step, say
        self.sheets: list[Path] = []

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if self.on_step is not None:
            self.on_step(step, steps, loss)
        if step % self.options.validation_every == 0 and step < steps:
            self.draw(step)

    def draw(self, step: int) -> None:
        prompts = [self.options.worded(prompt) for prompt in self.options.validation_prompts]
        if not prompts:
            return
        with self.model.drawing() as pipeline:
            images = sample(
                pipeline,
                prompts,
                seed=self.options.seed,
                steps=self.options.sampling_steps,
                guidance=self.options.guidance,
            )
        content = io.BytesIO()
        contact_sheet(images).save(content, "PNG")
        (self.folder / "validation").mkdir(exist_ok=True)
        path = self.folder / "validation" / f"step-{step}.png"
        write_atomically(path, content.getvalue())
        self.sheets.append(path)
        self.say(f"step {step}: {path}")


def _save(model: ConceptModel, options: ConceptOptions, folder: Path) -> None:
    for part in ADAPTED:
        if getattr(options, part) is not None:
            with fresh_folder(folder / part) as partial:
                # The word has a file of its own; the other embeddings are the base's.
                getattr(model, part).save_pretrained(str(partial), save_embedding_layers=False)
    if options.token is not None:
        assert model.token is not None
        save_token(folder, options.token, model.token.detach())


def _record(run: ConceptRun) -> dict[str, Any]:
    return {
        "options": run.options.to_json(),
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in run.losses],
        "trainable": run.trainable,
        "validation": [str(path.relative_to(run.output)) for path in run.validation],
    }

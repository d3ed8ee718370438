"""Text to image: adapters (and a new word) from a few pictures of a concept, on any Stable Diffusion folder.

DreamBooth's protocol (arXiv 2208.12242) with the new word of textual inversion (arXiv 2208.01618): the captions contain
the word, prompts of its class keep what the base knows, and only adapters and the word's embedding are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from ..errors import OptionError
from ..recipes.recipe import Recipe, Shown
from ..training.loop import Loss, Plan
from ..training.muon import MUON
from ..training.processes import join
from ..training.rates import head_learning_rate, learning_rate, usual_rate
from ..tuner import build_adapter_config
from .config import ConceptConfig

if TYPE_CHECKING:
    from .examples import Examples
    from .model import ConceptModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The attention of a UNet, as the papers adapt it."""
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]
"""The convolutions in the blocks of a UNet."""
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""The attention of a CLIP text encoder."""
# diffusers and pillow are imported by the methods that need them: `spectune init` needs neither.


class TextToImage(Recipe):
    """Adapts a Stable Diffusion pipeline, and a new word, to a few pictures of a concept."""

    Config = ConceptConfig
    in_pipeline = True
    title = "Text to image"
    example = {
        "model": "stable-diffusion",
        "adapter": {"unet": {"method": "spectral_a", "r": 8, "target_modules": [*ATTENTION, *CONVOLUTIONS]}},
        "training": {"steps": 500},
        "data": {"train": "my-dog", "caption": "a photo of {token}"},
        "word": {"token": "<my-dog>", "initial_word": "dog"},
        "prior": {"prompts": ["a photo of a dog"]},
        "drawings": {"prompts": ["{token} on a beach", "a dog on a beach"]},
    }
    config: ConceptConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if join().num_processes > 1:
            raise OptionError("recipe text_to_image: works only in one process. Start it without a launcher.")

    @cached_property
    def splits(self) -> dict[str, list[Path]]:
        from .data import picture_paths

        data = self.config.data
        folders = {"train": data.train, "validation": data.validation, "test": data.test}
        return {split: picture_paths(Path(folder)) for split, folder in folders.items() if folder is not None}

    @cached_property
    def examples(self) -> Examples:
        """The pictures as training examples; known once the model is built."""
        raise OptionError("examples: the model must be built first.")

    @property
    def model(self) -> ConceptModel:
        """The pipeline's trained parts."""
        return self.examples.model

    def build_model(self, weights: Path | None = None) -> nn.Module:
        from .examples import Examples
        from .model import ConceptModel
        from .pipeline import add_known_word, load_concepts, open_pipeline

        config = self.config
        pipeline = open_pipeline(config.model, config.revision, getattr(torch, config.dtype))
        if weights is not None:
            load_concepts(pipeline, [weights])
        elif config.word.token is not None:
            add_known_word(pipeline, config.word.token, str(config.word.initial_word))
        self.examples = Examples(config, ConceptModel(pipeline))
        return self.model

    def load(self, tuned: Path) -> nn.Module:
        self.__dict__.pop("loss", None)  # it is that of the model before
        return self.build_model(tuned)

    def attach(self, model: Any) -> tuple[nn.Module, list[tuple[list[nn.Parameter], float]]]:
        for split in self.splits:  # so that mistakes in pictures and captions show before any work
            self.examples.pictures(split)
        config, word = self.config, self.config.word.token
        set_seed(config.seed)  # LoRA's A is random
        for part, options in config.parts.items():
            options.setdefault("revision", config.revision)
            adapter = build_adapter_config(options)
            if asked := getattr(adapter, "needs_examples", ""):
                raise OptionError(
                    f"{part}: {asked} needs gradients of examples, which this recipe does not collect. Leave it out."
                )
            model.attach(part, adapter)
        if word is not None:
            model.train_word(word)
        first, *others = [model.parameters_of(part) for part in config.parts] or [[]]
        groups = [(first, learning_rate(config)), (model.parameters_of("token"), head_learning_rate(config))]
        return model, groups + [(parameters, self._text_rate()) for parameters in others]

    def _text_rate(self) -> float:
        """Get the rate of the text encoder's adapter if the UNet has one, too."""
        asked, options = self.config.training.text_encoder_learning_rate, self.config.parts["text_encoder"]
        method = str(options.get("method") or str(options.get("peft_type", "")).upper())
        method = MUON if self.config.training.optimizer == MUON and "method" in options else method
        return usual_rate(method, "training.text_encoder_learning_rate", options) if asked is None else asked

    def parts(self, model: Any) -> dict[str, int]:
        return dict(model.trainable())

    def ready(self, split: str) -> None:
        """Do nothing: `attach` reads pictures and captions, before the first step, in the pipeline's size."""

    def rows(self, split: str) -> Sequence[dict[str, Any]]:
        return self.examples.to_train() if split == "train" else self.examples.held_out(split)

    def plain_rows(self, split: str) -> Sequence[dict[str, Any]]:
        return self.examples.held_out(split)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.utils.data.default_collate(rows)
        return found

    def carrier(self, model: Any) -> nn.Module:
        unet: nn.Module = model.unet
        return unet

    @torch.no_grad()
    def seen(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Get what the UNet is called with for pictures at the noise of held-out ones."""
        device = next(model.unet.parameters()).device
        latents, noise, t, tokens = (batch[name].to(device) for name in ("latents", "noise", "t", "tokens"))
        found: dict[str, Any] = model.seen_by_unet(model.noise_levels.add_noise(latents, noise, t), t, tokens)
        return found

    def seen_while_drawing(self, model: Any, prompts: Sequence[str]) -> list[dict[str, Any]]:
        from .drawings import calls_while_drawing

        with model.drawing(untouched=True) as pipeline:
            return calls_while_drawing(pipeline, prompts, self.config.drawings, self.config.seed)

    @cached_property
    def loss(self) -> Loss | None:
        from .loss import denoising_loss

        return denoising_loss(self.model, self.config.seed, self.config.prior.weight, self.config.training.snr_gamma)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        from .loss import held_out_error

        rows, size = self.rows(split), 2 * self.config.training.batch_size  # more fit without gradients
        batches = [self.collate(list(rows[start : start + size])) for start in range(0, len(rows), size)]
        return {"loss": held_out_error(self.model, batches)}

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        self.examples.draw_prior()
        # The examples already contain all epochs, each with another picture of the class.
        made = super().trainer(model, plan, folder, callbacks, **({"num_train_epochs": 1} | more))
        made.can_return_loss = True  # otherwise transformers looks for labels, and computes no validation loss
        return made

    def callbacks(self, model: Any, run: Path) -> list[TrainerCallback]:
        from .drawings import DrawWhileTraining

        prompts = [self.config.worded(prompt) for prompt in self.config.drawings.prompts]
        return [DrawWhileTraining(model, self.config.drawings, prompts, self.config.seed, run)]

    def drawings(self, run: Path) -> list[tuple[str, bytes]]:
        from .drawings import sheets

        prompts = "; ".join(self.config.worded(prompt) for prompt in self.config.drawings.prompts)
        return [(f"step {step}: {prompts}", path.read_bytes()) for step, path in sheets(run)]

    def show(self) -> Shown:
        picture = self.splits["train"][0].name
        pieces = self.examples.caption(0)
        channels, height, width = self.examples.pictures("train")[0]["latents"].shape
        shape = f"{channels} x {height} x {width} latents"
        return Shown([(f"[{picture}: {shape}] ", False), *pieces], marks="is trained")

    def remarks(self) -> list[str]:
        asked, steps = self.config.prior, self.config.drawings.steps
        if not asked.prompts or asked.weight == 0:
            return []
        return [f"before training, the base draws {asked.images} pictures of the class, in {steps} steps each"]

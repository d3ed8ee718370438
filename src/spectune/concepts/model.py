"""`ConceptModel`: the trained parts of a pipeline: a UNet, a text encoder, and one word's embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import save_tensors
from ..errors import OptionError
from ..training.adalora import is_adalora
from ..training.checkpoints import OwnCheckpoints
from ..tuner import attach
from .config import ADAPTED
from .pipeline import TOKEN_FILE, save_token

# In a checkpoint: the state of the generator of the loss's noise.
NOISE_FILE = "noise.safetensors"


class ConceptModel(nn.Module, OwnCheckpoints):
    """The parts of a pipeline in training; only adapters and a new word's embedding are trained."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self._pipeline = [pipeline]  # in a list: it is not a module of this one
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        self.unet: Any = pipeline.unet
        self.text_encoder: Any = pipeline.text_encoder
        self.noise_levels = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.noise = torch.Generator("cpu")
        """The generator of the loss's noise and levels: its own, so that drawing pictures does not change steps."""
        self.word: str | None = None
        self.new_word: nn.Parameter | None = None

    @property
    def pipeline(self) -> Any:
        """The pipeline that the parts are of."""
        return self._pipeline[0]

    def attach(self, part: str, config: Any) -> None:
        """Put an adapter onto the UNet or the text encoder; `OptionError` for AdaLoRA, whose ranks would stay."""
        tuned = attach(getattr(self, part), config)
        if is_adalora(tuned):
            raise OptionError(
                f"adapter.{part}: AdaLoRA does not work here: it moves ranks only in a model with a single adapter. "
                f"Choose another method."
            )
        setattr(self, part, tuned)
        setattr(self.pipeline, part, tuned)

    def train_word(self, word: str) -> None:
        """Train one row of the embedding table: a separate parameter, inserted wherever its id occurs."""
        index = int(self.pipeline.tokenizer.convert_tokens_to_ids(word))
        table = self.text_encoder.get_input_embeddings()
        self.word, self.new_word = word, nn.Parameter(table.weight[index].detach().float().clone())

        def put_in(module: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
            assert self.new_word is not None
            return torch.where((args[0] == index)[..., None], self.new_word.to(found.dtype), found)

        table.register_forward_hook(put_in)

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Get the trained parameters of unet, text_encoder or token."""
        if part == "token":
            return [] if self.new_word is None else [self.new_word]
        return [parameter for parameter in getattr(self, part).parameters() if parameter.requires_grad]

    def trainable(self) -> dict[str, int]:
        """Get part -> how many numbers are trained."""
        counts = {part: sum(p.numel() for p in self.parameters_of(part)) for part in (*ADAPTED, "token")}
        return {part: count for part, count in counts.items() if count}

    @contextmanager
    def drawing(self, untouched: bool = False) -> Iterator[Any]:
        """Get the pipeline for drawing, as trained so far or with its adapters switched off."""
        was_training = self.training
        self.eval()
        self.pipeline.vae.to(next(self.unet.parameters()).device)
        try:
            with ExitStack() as off:
                for part in ADAPTED if untouched else ():
                    if hasattr(getattr(self, part), "disable_adapter"):
                        off.enter_context(getattr(self, part).disable_adapter())
                yield self.pipeline
        finally:
            self.train(was_training)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Get the UNet's answer for noisy latents (count, channels, height, width) at steps t."""
        found: torch.Tensor = self.unet(**self.seen_by_unet(noisy, t, tokens)).sample
        return found.float()

    def seen_by_unet(self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Get what the UNet is called with."""
        hidden = self.text_encoder(tokens)[0]
        return {"sample": noisy.to(hidden.dtype), "timestep": t, "encoder_hidden_states": hidden}

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write what `load_concepts` reads: a PEFT folder for each adapted part, and the word."""
        for part in ADAPTED:
            if hasattr(getattr(self, part), "peft_config"):
                # The word has its own file; the other embeddings are the base's.
                getattr(self, part).save_pretrained(str(Path(folder, part)), save_embedding_layers=False)
        if self.new_word is not None:
            save_token(Path(folder), str(self.word), self.new_word.detach())

    def save_checkpoint(self, folder: Path) -> None:
        """Write what is trained, and the state of the noise."""
        self.save_pretrained(folder)
        save_tensors(folder / NOISE_FILE, {"state": self.noise.get_state()})

    def load_checkpoint(self, folder: Path) -> None:
        """Load what `save_checkpoint` wrote."""
        for part in ADAPTED:
            if (folder / part).is_dir():
                getattr(self, part).load_adapter(str(folder / part), "default", is_trainable=True)
        if self.new_word is not None:
            self.new_word.data.copy_(load_file(folder / TOKEN_FILE)[str(self.word)])
        self.noise.set_state(load_file(folder / NOISE_FILE)["state"])

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Recompute activations in the backward."""
        self.unet.enable_gradient_checkpointing()
        self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5

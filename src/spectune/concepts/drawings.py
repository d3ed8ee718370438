"""`DrawWhileTraining`: draw the run's prompts before, during and after training, into the run's folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..checkpoint import write_atomically
from .config import Drawings
from .model import ConceptModel
from .pipeline import contact_sheet, sample

FOLDER = "validation"


class DrawWhileTraining(TrainerCallback):
    """Draws at regular steps; a continued run keeps its earlier drawings."""

    def __init__(self, model: ConceptModel, asked: Drawings, prompts: Sequence[str], seed: int, run: Path) -> None:
        self.model, self.asked, self.prompts, self.seed, self.run = model, asked, list(prompts), seed, run
        self._drawn: dict[int, bytes] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.draw(0)  # written after the first step: until then the folder may hold the run that is replaced

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.asked.every == 0 or state.global_step == state.max_steps:
            self.draw(state.global_step)
        self._write()

    def draw(self, step: int) -> None:
        """Draw the pictures of a step as one sheet."""
        if not self.prompts:
            return
        with self.model.drawing() as pipeline:
            images = sample(
                pipeline, self.prompts, seed=self.seed, steps=self.asked.steps, guidance=self.asked.guidance
            )
        content = io.BytesIO()
        contact_sheet(images).save(content, "PNG")
        self._drawn[step] = content.getvalue()

    def _write(self) -> None:
        for step, png in self._drawn.items():
            (self.run / FOLDER).mkdir(exist_ok=True)
            write_atomically(self.run / FOLDER / f"step-{step}.png", png)
        self._drawn.clear()


def calls_while_drawing(pipeline: Any, prompts: Sequence[str], asked: Drawings, seed: int) -> list[dict[str, Any]]:
    """Get what a pipeline's UNet is called with, step by step, while it draws prompts."""
    calls: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["encoder_hidden_states"]
        calls.append({"sample": args[0], "timestep": args[1], "encoder_hidden_states": hidden})

    watching = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sample(pipeline, prompts, seed=seed, steps=asked.steps, guidance=asked.guidance, output_type="latent")
    finally:
        watching.remove()
    return calls


def sheets(run: Path) -> list[tuple[int, Path]]:
    """Get (step, file) of what a run has drawn, in the order of the steps."""
    found = (run / FOLDER).glob("step-*.png")
    return sorted((int(path.stem.removeprefix("step-")), path) for path in found)

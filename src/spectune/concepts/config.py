"""`ConceptConfig`: the configuration of a text_to_image run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..training.config import HEAD, PathOrName, RunConfig, Section, Training

ADAPTED = ("unet", "text_encoder")
"""The parts that can have adapters; each has a folder of this name in a concept's output."""
# The Spectral Adapter's fusion experiments (arXiv 2405.13952) used this rate for the word.
WORD_RATE = 1e-3


class Adapters(Section):
    """The adapters of a pipeline."""

    unet: dict[str, Any] | None = Field(None, description="{method: …} or {peft_type: …}.")
    text_encoder: dict[str, Any] | None = Field(None, description="{method: …} or {peft_type: …}.")

    @model_validator(mode="after")
    def _something(self) -> Adapters:
        if self.unet is None and self.text_encoder is None:
            raise ValueError("give unet, text_encoder or both; `adapter: head` trains only the new word")
        return self


class Pictures(Section):
    """Folders of pictures; their own captions are in metadata.jsonl or NAME.txt."""

    train: PathOrName = Field(description="Folder with 3 to 10 pictures of the concept.")
    validation: PathOrName | None = Field(None, description="Folder of pictures to choose settings on.")
    test: PathOrName | None = Field(None, description="Folder of pictures for the final figures.")
    caption: str = Field("a {token}", description="Caption of pictures without their own; {token} is the new word.")
    masks: PathOrName | None = Field(
        None, description="Folder with NAME.png for every picture of train: white where the loss counts."
    )


class Word(Section):
    """A new word, whose embedding is trained; without it captions use words that the base knows."""

    token: str | None = Field(None, description="The new word, such as <my-dog>.")
    initial_word: str | None = Field(None, description="The known word it starts from: its class, such as dog.")

    @model_validator(mode="after")
    def _both(self) -> Word:
        if (self.token is None) != (self.initial_word is None):
            raise ValueError("a new word starts from a known one; give token and initial_word, or neither")
        return self


class ClassPrior(Section):
    """Pictures of the concept's class, drawn by the base and trained together with the concept (DreamBooth)."""

    prompts: list[str] = Field(default_factory=list, description="Prompts that the base draws before training.")
    images: int = Field(32, gt=0, description="Number of pictures it draws.")
    weight: float = Field(1.0, ge=0, description="Weight of their loss; 1 is DreamBooth's.")


class Drawings(Section):
    """Pictures for the page: drawn before, regularly during, and after training, from the same noise."""

    prompts: list[str] = Field(default_factory=list, description="Prompts to draw; {token} is the new word.")
    every: int = Field(100, gt=0, description="Steps between two drawings.")
    steps: int = Field(20, gt=0, description="Sampling steps of a picture, also for the prior.")
    guidance: float = Field(7.5, description="Classifier-free guidance, also for the prior.")


class ConceptTraining(Training):
    """The loop, with the options of denoising."""

    batch_size: int = Field(2, gt=0, description="Pictures of the concept in one forward pass; as many of the prior.")
    head_learning_rate: float | None = Field(None, gt=0, description=f"Rate of the new word; default: {WORD_RATE:g}.")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, description="Rate of its adapter if the UNet has one, too; default: the method's own."
    )
    snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR weighting of the noise levels (arXiv 2303.09556: 5); default: all equal."
    )


class ConceptConfig(RunConfig):
    """A run of the recipe text_to_image."""

    usual_head_rate: ClassVar[float | None] = WORD_RATE

    model: PathOrName = Field(description="Pipeline of diffusers with one UNet, one text encoder and an autoencoder.")
    adapter: Adapters | Literal["head"] = Field(  # type: ignore[assignment]
        description="{unet: {method: …}, text_encoder: {peft_type: …}}, or head (only the new word)."
    )
    training: ConceptTraining
    data: Pictures
    word: Word = Field(default_factory=lambda: Word.model_validate({}))
    prior: ClassPrior = Field(default_factory=lambda: ClassPrior.model_validate({}))
    drawings: Drawings = Field(default_factory=lambda: Drawings.model_validate({}))

    @model_validator(mode="after")
    def _fits(self) -> ConceptConfig:
        told, parts = self.training, self.parts
        if self.adapter == HEAD and self.word.token is None:
            raise ValueError("adapter: head trains only the new word; give word.token")
        if told.head_first:
            raise ValueError("training.head_first is for classifiers; leave it out")
        if told.head_learning_rate is not None and self.word.token is None:
            raise ValueError("training.head_learning_rate is the new word's; give word.token, or leave it out")
        if told.text_encoder_learning_rate is not None and len(parts) < 2:
            raise ValueError(
                "training.text_encoder_learning_rate is that of a second adapter, beside the UNet's; "
                "adapter.text_encoder alone is trained at training.learning_rate"
            )
        if self.word.token is None and any("{token}" in prompt for prompt in self.drawings.prompts):
            raise ValueError("drawings.prompts contain {token}; give word.token")
        if any("{token}" in prompt for prompt in self.prior.prompts):
            raise ValueError("prior.prompts contain {token}; they must name the concept's class, which the base knows")
        return self

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Part -> options of its adapter; training.learning_rate is for the first."""
        asked = {} if isinstance(self.adapter, str) else {name: getattr(self.adapter, name) for name in ADAPTED}
        return {name: dict(options) for name, options in asked.items() if options is not None}

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """The options of every part's adapter."""
        return list(self.parts.values())

    @property
    def adapter_options(self) -> dict[str, Any] | None:
        """The options of the first adapter; empty for only the word, which is saved like an adapter."""
        return next(iter(self.parts.values()), {})

    def worded(self, text: str) -> str:
        """Get a caption or prompt with the new word in its place."""
        return text if self.word.token is None else text.replace("{token}", self.word.token)

"""`Recipe`: what a recipe provides: a base model, examples, a Trainer, a metric, one example to show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.task_file import Task, read_task
from ..errors import DataError, OptionError
from ..training.arguments import checked_arguments, loop_arguments
from ..training.config import RunConfig
from ..training.loop import Loss, Plan, looped
from ..tuner import load_attached


@dataclass(frozen=True)
class Shown:
    """One training example as the model sees it: pieces of text, and whether each carries loss."""

    pieces: list[tuple[str, bool]]
    answer: str = ""
    """The label, if the answer is not among the pieces."""
    marks: str = "carries loss"
    """The meaning of the mark."""


@dataclass(frozen=True)
class Answered:
    """One held-out example with the right answer and the model's."""

    text: str
    expected: str
    predicted: str


@dataclass(frozen=True)
class Sampled:
    """What the model wrote for a held-out prompt with its adapter off and on."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Written:
    """One text that a model wrote while it learned, and its reward."""

    step: int
    prompt: str
    text: str
    reward: float


class Recipe:
    """One kind of task. A new recipe is one file with a child of this class, and one row in RECIPES."""

    Config: ClassVar[type[RunConfig]]
    """The class of its configuration."""
    task_type: ClassVar[str | None] = None
    """PEFT's name of the task, for the saved adapter."""
    title: ClassVar[str]
    example: ClassVar[dict[str, Any]]
    """A small run, as `spectune init` prints it."""

    in_pipeline: ClassVar[bool] = False
    """Whether the module that carries the adapter gets its inputs from other parts of a pipeline."""
    curves: ClassVar[dict[str, str]] = {}
    """What the trainer logs at each step besides the loss -> its name on the page."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The examples of each split."""
        raise NotImplementedError

    def build_model(self, weights: Path | None = None) -> nn.Module:
        """Get the base model with a head for the task, or the fully tuned one from a run's folder."""
        raise NotImplementedError

    def head(self, model: nn.Module) -> list[str]:
        """Get the names of new modules that are trained in full and saved with the adapter."""
        return []

    def attach(self, model: nn.Module) -> tuple[nn.Module, list[tuple[list[nn.Parameter], float]]] | None:
        """Get the model with its adapters, and `Plan.rates`; None for the usual case: one adapter and one head."""
        return None

    def task(self, model: nn.Module) -> Task | None:
        """Get what is saved beside the adapter: the model's class and the names of its classes; None for no head."""
        return None

    def load(self, tuned: Path) -> nn.Module:
        """Get the tuned model of a finished run, from its base and its folder."""
        if self.config.adapter_options is None:
            return self.build_model(tuned)
        basis = self.config.adapter_options.get("basis")
        return load_attached(self.build_model(), tuned, basis=basis)

    def parts(self, model: nn.Module) -> dict[str, int]:
        """Get part -> trained numbers, if the adapter has several parts; each is a folder or file of that name."""
        return {}

    def callbacks(self, model: nn.Module, run: Path) -> list[TrainerCallback]:
        """Get more callbacks for a run that trains into a folder; a range test does not use them."""
        return []

    def drawings(self, run: Path) -> list[tuple[str, bytes]]:
        """Get (caption, PNG file) of each picture that a run drew into its folder."""
        return []

    def written(self, run: Path) -> list[Written]:
        """Get some texts that the model wrote during a run, out of its folder."""
        return []

    def rows(self, split: str) -> Sequence[dict[str, Any]]:
        """Get the examples of a split for the collator."""
        raise NotImplementedError

    def plain_rows(self, split: str) -> Sequence[dict[str, Any]]:
        """Get the examples of a split without what training changes in them at random."""
        return self.rows(split)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Get a batch."""
        raise NotImplementedError

    def carrier(self, model: nn.Module) -> nn.Module:
        """Get the module that carries the adapter."""
        return model

    def seen(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Get what the carrier is called with for a batch, without labels."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def seen_while_drawing(self, model: nn.Module, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Get what the carrier is called with while a pipeline draws prompts."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Get the logits of one batch without labels, a row for each example."""
        logits: torch.Tensor = model(**batch).logits
        return logits

    @property
    def loss(self) -> Loss | None:
        """The loss; None for the model's own."""
        return None

    @property
    def processing(self) -> Any:
        """The tokenizer or image processor, saved with the adapter; None if there is none."""
        return None

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Get the metrics of a model on a split."""
        raise NotImplementedError

    def show(self) -> Shown:
        """Get the first training example as the model sees it."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Read, label and tokenise every split and try every metric on it, so that mistakes show before training.

        Called before the model is built.
        """
        for split in self.splits:
            self.ready(split)

    def ready(self, split: str) -> None:
        """Read the examples of a split as training and evaluation do, and try the metrics; raises where they would."""
        raise NotImplementedError

    def classes(self) -> dict[str, dict[str, int]]:
        """Get split -> class -> number of examples; empty without classes."""
        return {}

    def warnings(self) -> list[str]:
        """Get possible mistakes in the examples, one sentence each; `check` and `train` print them."""
        return []

    def remarks(self) -> list[str]:
        """Get other facts about the examples for `check`, one sentence each."""
        return []

    def harness(self, model: nn.Module) -> dict[str, float]:
        """Get the figures of the run's external evaluation."""
        return {}

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        """Get some held-out examples with the model's answers, for the report."""
        return []

    def confusion(self, model: nn.Module, split: str) -> tuple[list[str], list[list[int]]] | None:
        """Get the classes, and how many examples of each (a row) the model takes for which; None without classes."""
        return None

    def samples(self, model: nn.Module, split: str, count: int) -> list[Sampled]:
        """Get what the model writes for some held-out prompts, before and after training."""
        return []

    def generate(self, model: nn.Module, prompts: Sequence[str], **options: Any) -> list[str]:
        """Get the model's continuation of each prompt."""
        raise OptionError(
            f"recipe {self.config.recipe}: does not write text. `spectune generate` is for causal_lm runs."
        )

    def as_prompt(self, text: str) -> Any:
        """Get a user's words in the form of training."""
        return text

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        """Get the Trainer of this recipe; `more` overrides the loop's arguments."""
        validates = self.config.training.validate_every is not None
        made = looped(Trainer)(
            model=model,
            args=checked_arguments(TrainingArguments, loop_arguments(self.config, folder) | more),
            train_dataset=self.rows("train"),
            eval_dataset=self.rows(self.validation_split()) if validates else None,
            data_collator=self.collate,
            processing_class=self.processing,
            callbacks=list(callbacks),
            plan=plan,
        )
        # Most classifiers accept the number of labels in a step but do not divide by it; the Trainer assumes that they
        # do, and would add up the batches' means instead of averaging them.
        made.model_accepts_loss_kwargs = False
        return made

    def validation_split(self) -> str:
        """Get the name of the validation split; `DataError` if there is none."""
        if "validation" not in self.splits:
            raise DataError(
                "training.validate_every: there are no validation examples. Give data.validation or "
                "data.validation_share."
            )
        return "validation"


def task_of(model: Any, pooling: str | None = None) -> Task:
    """Get what is saved beside an adapter with a head: the class of the model and the names of its classes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Task.of(inner.config, type(inner).__name__, pooling)


def refuse_other_labels(tuned: Path, labels: list[str]) -> None:
    """Raise `DataError` where a run's adapter was trained on other classes than the data have now."""
    learned = read_task(tuned).labels
    if learned and list(learned) != labels:
        raise DataError(
            f"data.train: the classes are {', '.join(labels[:5])} now, but this run was trained on "
            f"{', '.join(learned[:5])}. Restore the data that it was trained on."
        )


@torch.no_grad()
def batched_logits(
    recipe: Recipe, model: nn.Module, rows: Sequence[dict[str, Any]], order: Sequence[int]
) -> torch.Tensor:
    """Get the logits of each row, in the rows' order; `order` batches rows of similar length."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    size = 2 * recipe.config.training.batch_size  # more fit without gradients
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), size):
        places = order[start : start + size]
        batch = {name: t.to(device) for name, t in recipe.collate([rows[i] for i in places]).items()}
        labels = batch.pop("labels", None)
        assert labels is None or len(labels) == len(places)
        found |= dict(zip(places, recipe.logits(model, batch).float().cpu(), strict=True))
    model.train(was_training)
    return torch.stack([found[i] for i in range(len(order))])


def some(items: Sequence[Any], count: int, seed: int) -> list[int]:
    """Get the indices of some items, drawn by the seed."""
    return sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))

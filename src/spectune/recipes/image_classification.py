"""Image classification: folders, .npz files, packaged or hub data; ViT and CNN of transformers, or timm through it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import AutoModelForImageClassification, TrainerCallback

from ..checkpoint.task_file import Task
from ..errors import DataError, MissingExtraError, OptionError, one_line
from ..training.config import SPLITS, DataSection, RunConfig, Section
from ..training.loop import Plan
from .data import held_out, limited
from .images import Packaged, Picture, Pixels, image_processor, load_pictures, pixels_of, unread
from .labels import count, ordered, spellings, unlearned
from .metrics import confused, measure, try_metrics
from .pretrained import pretrained
from .recipe import Answered, Recipe, Shown, batched_logits, refuse_other_labels, some, task_of

ImageMetric = Literal["accuracy", "f1", "macro_f1", "matthews"]


class ImageData(DataSection):
    """Images with labels."""

    packaged: Packaged | None = Field(None, description="digits: the 1,797 small digits in scikit-learn.")
    image_size: int | None = Field(None, gt=0, description="Side of the square input; default: the model's.")
    augment: bool = Field(True, description="Random crops and mirror images while training.")

    @model_validator(mode="after")
    def _one_source(self) -> ImageData:
        if self.packaged and (self.train or self.hub or self.validation or self.test):
            raise ValueError("packaged data has its own splits; leave train, validation, test and hub out")
        if self.train and self.train.endswith(".npz") and not self.hub and (self.validation or self.test):
            raise ValueError("an .npz file contains x_validation and x_test; leave validation and test out")
        return self


class ImageEvaluation(Section):
    """How the answers are scored."""

    metrics: list[ImageMetric] = Field(["accuracy"], min_length=1, description="Computed on validation and test.")


class ImageClassificationConfig(RunConfig):
    """A run of the recipe image_classification."""

    data: ImageData
    evaluation: ImageEvaluation = Field(default_factory=lambda: ImageEvaluation.model_validate({}))


@dataclass
class _Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures as tensors, each opened when it is needed."""

    pictures: Sequence[Picture]
    targets: Sequence[int]
    pixels: Pixels
    seed: int | None
    """Augments if given. A crop depends only on seed, epoch and place, so that a resumed run sees the same."""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> dict[str, Any]:
        chance = None if self.seed is None else random.Random(f"{self.seed} {self.epoch} {place}")
        return {"pixel_values": self.pixels(self.pictures[place].open(), chance), "labels": self.targets[place]}


class _TellEpoch(TrainerCallback):
    def __init__(self, rows: _Images) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.epoch = int(state.epoch or 0)


class ImageClassification(Recipe):
    """Adapts an image model to images with labels."""

    Config = ImageClassificationConfig
    title = "Image classification"
    example = {
        "model": "google/vit-base-patch16-224-in21k",
        "adapter": {"method": "spectral_a", "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "images/train", "test": "images/test", "validation_share": 0.1},
        "training": {"epochs": 10, "batch_size": 64, "warmup": 0.1},
    }
    config: ImageClassificationConfig

    @cached_property
    def everything(self) -> dict[str, list[Picture]]:
        """Every picture of every split, before limits: the classes are counted here."""
        data = self.config.data
        return held_out(load_pictures(data, data.packaged), data, self.config.seed)

    @cached_property
    def splits(self) -> dict[str, list[Picture]]:
        return limited(self.everything, self.config.data, self.config.seed)

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes, sorted (as numbers if all are)."""
        found = ordered(picture.label for picture in self.everything["train"])
        if len(found) < 2:
            raise DataError(f"data.train: at least two classes are needed, but it has only {found}. Add examples.")
        return found

    def classes(self) -> dict[str, dict[str, int]]:
        return count(self.labels, {s: [picture.label for picture in part] for s, part in self.splits.items()})

    def warnings(self) -> list[str]:
        labels = [picture.label for part in self.everything.values() for picture in part]
        return [*spellings(labels), *unlearned(self.classes()), *self._unread()]

    def _unread(self) -> list[str]:
        data, said = self.config.data, []
        for name in (getattr(data, split) for split in SPLITS if not data.hub and not data.packaged):
            if name and Path(name).is_dir() and (left := unread(Path(name))):
                said.append(
                    f"{name}: {len(left):,} files or folders in it are ignored, such as {left[0].relative_to(name)}"
                )
        return said

    @cached_property
    def processing(self) -> Any:
        try:
            return image_processor(self.config.model, revision=self.config.revision or "main")
        except (OSError, ValueError):
            return None  # timm's models and bare configs have none; then the model has the sizes

    @cached_property
    def pixels(self) -> Pixels:
        """Turns an image into this model's input. The model has the sizes: it is built here if nobody has built it."""
        self.build_model()
        return vars(self)["pixels"]

    def build_model(self, weights: Path | None = None) -> nn.Module:
        names = dict(enumerate(self.labels))
        try:
            model = pretrained(
                AutoModelForImageClassification,
                self.config,
                weights,
                self.head,
                num_labels=len(names),
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
        except ImportError as error:
            raise MissingExtraError(f"model: {one_line(error)}. Run: pip install 'spectune[vision]'") from None
        self.pixels = pixels_of(model, self.processing, self.config.data.image_size)
        return model

    def head(self, model: nn.Module) -> list[str]:
        timm_model: Any = getattr(model, "timm_model", None)
        if timm_model is not None:
            return [f"timm_model.{timm_model.default_cfg['classifier']}"]
        names = [
            n for n in ("classifier", "cls_classifier", "distillation_classifier", "fc", "head") if hasattr(model, n)
        ]
        if not names:
            raise OptionError(
                f"model: {type(model).__name__} has no head named classifier, fc or head. Choose another model."
            )
        return names

    def task(self, model: nn.Module) -> Task:
        return task_of(model)

    def load(self, tuned: Path) -> nn.Module:
        refuse_other_labels(tuned, self.labels)
        return super().load(tuned)

    def ready(self, split: str) -> None:
        targets = self.targets(split)
        try_metrics(self.config.evaluation.metrics, targets, len(self.labels))
        for picture in self.splits[split]:  # a damaged one would end the training later
            picture.open()

    def rows(self, split: str) -> Any:
        augments = split == "train" and self.config.data.augment
        return _Images(self.splits[split], self.targets(split), self.pixels, self.config.seed if augments else None)

    def plain_rows(self, split: str) -> Any:
        """Get the examples of a split without augmentation."""
        return _Images(self.splits[split], self.targets(split), self.pixels, None)

    def targets(self, split: str) -> list[int]:
        """Get the index of each picture's class."""
        places = {name: place for place, name in enumerate(self.labels)}
        unknown = [picture for picture in self.splits[split] if picture.label not in places]
        if unknown:
            raise DataError(
                f"{unknown[0].name}: the class {unknown[0].label!r} does not occur in train ("
                f"{len(unknown)} such pictures in {split}). Correct it, or add it to train."
            )
        return [places[picture.label] for picture in self.splits[split]]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        made = super().trainer(model, plan, folder, callbacks, **more)
        made.add_callback(_TellEpoch(made.train_dataset))
        return made

    def predict(self, model: nn.Module, split: str, places: Sequence[int] | None = None) -> list[int]:
        """Get the index of the likeliest class of each picture."""
        order = list(range(len(self.splits[split]))) if places is None else list(places)
        rows = self.plain_rows(split)
        chosen = torch.utils.data.Subset(rows, order)
        found: list[int] = batched_logits(self, model, chosen, list(range(len(order)))).argmax(-1).tolist()  # type: ignore[arg-type]
        return found

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return measure(self.config.evaluation.metrics, self.predict(model, split), self.targets(split))

    def confusion(self, model: nn.Module, split: str) -> tuple[list[str], list[list[int]]] | None:
        return self.labels, confused(self.predict(model, split), self.targets(split), len(self.labels))

    def show(self) -> Shown:
        picture = self.splits["train"][0]
        width, height = picture.open().size
        to_height, to_width = self.pixels.size
        return Shown(
            [(f"[{picture.name}: {width} x {height} -> {to_width} x {to_height} pixels]", False)], picture.label
        )

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        places = some(self.splits[split], count, self.config.seed)
        found = self.predict(model, split, places)
        chosen = [self.splits[split][i] for i in places]
        return [Answered(p.name, p.label, self.labels[f]) for p, f in zip(chosen, found, strict=True)]

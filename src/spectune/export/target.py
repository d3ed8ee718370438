"""Which transformers model an adapter makes of its base: `model_class`, `find_target`, and the config it needs."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoint import CONFIG_LIMIT, AdapterFolder, load_auto, write_atomically
from ..checkpoint.model_class import class_named, without_memory
from ..checkpoint.reader import read_json
from ..checkpoint.task_file import read_task
from ..errors import ExportError

# PEFT's task types and the Auto class that PEFT's own AutoPeftModel* loads for each (peft/auto.py).
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Heads whose first side is the number of labels (transformers' classification models).
HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


@dataclass(frozen=True, eq=False)
class ModelTarget:
    """The model that a merged checkpoint is: its class without weights, and whether the base is of another class."""

    model: Any
    changes_class: bool
    options: dict[str, Any]
    """What goes over the base's config: names of classes and the like."""


def model_class(folder: AdapterFolder) -> Any:
    """Get the class that a saved adapter is for, or the Auto class of its task; `ExportError` where it says neither."""
    task = folder.config.get("task_type")
    if isinstance(task, str) and task in AUTO_CLASSES:
        return getattr(transformers, AUTO_CLASSES[task])
    if (found := _class_said(folder)) is not None:
        return found
    mapping = folder.config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    raise ExportError(
        f"{folder.path}: the config does not say which transformers model the adapter belongs to (task_type {task!r}, "
        f"class {name!r}). Pass the model itself as base_model."
    )


def _class_said(folder: AdapterFolder) -> Any:
    """Get the class of transformers that task.json or PEFT's auto_mapping names, or None."""
    mapping = folder.config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    said = [("transformers", str(read_task(folder.path).architecture))]
    said += [(str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", "")))]
    for library, name in said:
        # The file may come from anybody: only transformers' own modules are imported on its word.
        if library.split(".")[0] == "transformers":
            try:
                found = getattr(importlib.import_module(library), name, None)
            except (ImportError, ValueError):
                found = None
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
    return None


def config_options(folder: AdapterFolder) -> dict[str, Any]:
    """Get what goes over the base's config, by task.json and by the number of rows of the trained head."""
    shapes = (shape for name, shape in folder.shapes.items() if len(shape) == 2 and name.endswith(HEADS))
    classifies = folder.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    return read_task(folder.path).config_options(next((shape[0] for shape in shapes), None) if classifies else None)


def find_target(folder: AdapterFolder, base: Path, new_class: bool = True) -> ModelTarget | None:
    """Get the model that the adapter makes of this base; None for a base without a class of transformers.

    The adapter's class counts where it has a head: of the base's body alone it makes that class. An adapter that was
    trained on the body leaves the base's class, and so does `new_class=False`.
    """
    if not (base / "config.json").is_file():
        return None
    kind, options = class_named(base), config_options(folder)
    config = _config(base, options)
    said = None if config is None or not new_class else _concrete(folder, config)
    if said is None or said is kind:
        return None if kind is None else ModelTarget(without_memory(kind, base, options), False, options)
    if kind is not None and said.config_class is not kind.config_class:
        return ModelTarget(without_memory(kind, base), False, {})
    model = without_memory(said, base, options)
    if model.base_model is model and kind is not None:
        return ModelTarget(without_memory(kind, base), False, {})
    return ModelTarget(model, True, options)


def _config(base: Path, options: dict[str, Any]) -> Any:
    try:
        return load_auto(transformers.AutoConfig, base, **options)
    except (OSError, ValueError, KeyError):  # a model that transformers does not know: diffusers', or anybody's
        return None


def _concrete(folder: AdapterFolder, config: Any) -> Any:
    """Get the class of transformers that the adapter is for with this config, or None."""
    if (said := _class_said(folder)) is not None:
        return said
    task = folder.config.get("task_type")
    if not isinstance(task, str) or task not in AUTO_CLASSES:
        return None
    try:
        with torch.device("meta"):
            return type(getattr(transformers, AUTO_CLASSES[task]).from_config(config, trust_remote_code=False))
    except ValueError:  # no class of this model for this task
        return None


def write_config(base: Path, folder: Path, target: ModelTarget, untied: bool) -> None:
    """Write the base's config with the target's class, its classes' names, and no ties where weights are apart now."""
    said = read_json(base / "config.json", CONFIG_LIMIT)
    plain, wanted = (_config(base, options).to_dict() for options in ({}, target.options))
    changed = {name: value for name, value in wanted.items() if plain.get(name) != value}
    if target.changes_class:
        changed["architectures"] = [type(target.model).__name__]
    if untied:
        changed["tie_word_embeddings"] = False
    # JSON has no numbers as keys; sorted as they stand, so that 10 does not come before 2.
    write_atomically(folder / "config.json", json.dumps({**said, **changed}, indent=2, ensure_ascii=False) + "\n")

"""`task.json` beside an adapter: which class of model it is for, and what its classes are called.

PEFT's config has no place for class names, and a config.json here would make transformers take the adapter for a whole
model (it does so for any folder that has one, integrations/peft.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .adapter_folder import CONFIG_LIMIT
from .reader import read_json
from .writer import write_atomically

TASK_FILE = "task.json"
KINDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "labels": list,
    "problem_type": str,
    "pad_token_id": int,
    "pooling": str,
}


@dataclass(frozen=True)
class Task:
    """What a model's config must say for an adapter with its own head."""

    architecture: str | None = None
    """The class in transformers that was trained: BertForSequenceClassification."""
    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of the head's rows; empty for scores."""
    problem_type: str | None = None
    """transformers' word: single_label_classification, multi_label_classification or regression."""
    pad_token_id: int | None = None
    """A classifier over a decoder looks for the last token before the padding."""
    pooling: str | None = None
    """`mean` where the logits of a sentence are the mean of its tokens' logits."""

    @classmethod
    def of(cls, config: Any, architecture: str, pooling: str | None = None) -> Task:
        """Get what the config of a live model says."""
        problem, names = getattr(config, "problem_type", None), getattr(config, "id2label", None) or {}
        labels = () if problem == "regression" else tuple(str(names[place]) for place in sorted(names))
        pad = getattr(config, "pad_token_id", None)
        return cls(architecture, labels, problem, pad if isinstance(pad, int) else None, pooling)

    def config_options(self, label_count: int | None = None) -> dict[str, Any]:
        """Get what goes over the base's config; `label_count` (rows of the head) counts where there are no names."""
        options: dict[str, Any] = {}
        if self.labels:
            options["id2label"] = dict(enumerate(self.labels))
            options["label2id"] = {name: place for place, name in enumerate(self.labels)}
        elif label_count:
            options["num_labels"] = label_count
        single = {"problem_type": self.problem_type, "pad_token_id": self.pad_token_id}
        return options | {name: value for name, value in single.items() if value is not None}

    def write(self, folder: Path) -> None:
        """Write task.json."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        write_atomically(folder / TASK_FILE, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def read_task(folder: Path) -> Task:
    """Get what task.json says, nothing where there is none; `AdapterError` for a damaged one."""
    if not (folder / TASK_FILE).exists():
        return Task()
    said = read_json(folder / TASK_FILE, CONFIG_LIMIT)
    for name, value in said.items():
        if name in KINDS and (not isinstance(value, KINDS[name]) or isinstance(value, bool)):
            raise AdapterError(f"{folder / TASK_FILE}: {name}={str(value)[:60]!r} has the wrong type. Copy it again.")
    labels = said.get("labels", [])
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise AdapterError(f"{folder / TASK_FILE}: labels must be texts, each named once. Copy it again.")
    found: Mapping[str, Any] = {name: said[name] for name in KINDS if name in said}
    return Task(**{**found, "labels": tuple(labels)})

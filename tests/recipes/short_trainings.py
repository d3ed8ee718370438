"""Trainings of a step or two, for options that nothing but a training shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from tests.recipes.every_field import Run


@dataclass
class Step:
    """What one real step did; `Run.told` with steps=1 gives the run."""

    moved: float
    """Norm of the change of what is trained."""
    gradient: float
    dtype: torch.dtype
    """Of an adapted layer's output."""
    forwards: int
    """Of that layer."""


_SeenT = TypeVar("_SeenT")


def once(look: Callable[[Run], _SeenT]) -> Callable[[Run], _SeenT]:
    """Train but once for what is told the same."""
    found: dict[tuple[Any, ...], _SeenT] = {}

    def remembered(run: Run) -> _SeenT:
        key = (run.file, run.words)
        if key not in found:
            found[key] = look(run)
        return found[key]

    return remembered


@once
def step(run: Run) -> Step:
    """Train a run of its own for one step of plain gradient descent at a rate of one."""
    rate = "training.head_learning_rate=1.0" if run.recipe.head(run.model) else "seed=0"
    words = ("training.optimizer=sgd", "training.learning_rate=1.0", rate, "training.warmup=0", "training.steps=1")
    own = run.told(*words)
    layer = next(m for m in own.model.modules() if isinstance(getattr(m, "base_layer", None), nn.Linear))
    outputs: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, args, found: outputs.append(found.dtype))
    trained = [p for p in own.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer = own.recipe.trainer(*own._built, own.file.parent / "out", save_strategy="no")
    trainer.train()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(trained, before, strict=True)]).norm()
    norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    return Step(float(moved), float(norm), outputs[0], len(outputs))


@once
def saved(run: Run) -> list[str]:
    """Train a run of its own for two steps, and get what lies in its folder then."""
    own = run.told("training.steps=2")
    folder = own.file.parent / "saved" / str(abs(hash(own.words)))
    own.recipe.trainer(*own._built, folder).train()
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@once
def logged(run: Run) -> list[int]:
    """Train a run of its own for two steps, and get those after which the validation loss was looked at."""
    own = run.told("training.steps=2")
    trainer = own.recipe.trainer(*own._built, own.file.parent / "out", save_strategy="no")
    trainer.train()
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]

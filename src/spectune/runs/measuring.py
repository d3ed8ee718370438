"""`measure`: the metrics of a model on what was held out; what fails after training is kept, and raised later."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from ..errors import DataError, one_line
from ..recipes.recipe import Recipe
from .result import RunResult

VALIDATION, TEST, HARNESS = "validation", "test", "lm_eval"
PARTS = (VALIDATION, TEST, HARNESS)
Figures = dict[str, dict[str, float]]


def measure(recipe: Recipe, model: nn.Module) -> Figures:
    """Get the metrics of every held-out split, and lm-eval's where the run asks for it."""
    return {name: figures for name, get in _measurements(recipe, model, None) if (figures := get())}


def measured(recipe: Recipe, model: nn.Module, parts: Collection[str] | None = None) -> tuple[Figures, dict[str, str]]:
    """Get what `measure` gets as far as it can be had, and the error of each part where it cannot.

    `parts` are some of validation, test and lm_eval; default: all.
    """
    found: Figures = {}
    failed: dict[str, str] = {}
    for name, get in _measurements(recipe, model, parts):
        try:
            found |= {name: figures} if (figures := get()) else {}
        except Exception as error:  # of any kind: the training before it must not be lost
            failed[name] = f"{type(error).__name__}: {one_line(error, 500)}"
    return found, failed


def _measurements(
    recipe: Recipe, model: nn.Module, parts: Collection[str] | None
) -> list[tuple[str, Callable[[], dict[str, float]]]]:
    splits = [split for split in (VALIDATION, TEST) if split in recipe.splits]
    found: list[tuple[str, Callable[[], dict[str, float]]]]
    found = [(split, lambda split=split: recipe.evaluate(model, split)) for split in splits]  # type: ignore[misc]
    found.append((HARNESS, lambda: recipe.harness(model)))
    return [(name, get) for name, get in found if parts is None or name in parts]


def refuse_unmeasured(result: RunResult) -> None:
    """Raise `DataError` for a result that lacks metrics."""
    for name, why in result.unmeasured.items():
        raise DataError(
            f"{result.folder}: the training is saved, but the metrics of {name} failed: {why}. Correct this and train "
            f"with --resume: only the metrics are computed again."
        )

"""Load a run's model, as it was before or after training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import set_seed

from ..errors import AdapterError
from ..recipes.recipe import Recipe
from ..recipes.table import recipe_class
from ..training.loop import quiet_libraries
from ..training.processes import join
from .folder import Run


def load_run(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe and the tuned model of a run's folder, ready to evaluate; `AdapterError` if it was not finished.

    `overrides` may change only what is evaluated (`evaluation.x=…`).
    """
    run = Run.open(folder)
    recipe = recipe_of(run, overrides)
    return recipe, reloaded(recipe, run)


def reloaded(recipe: Recipe, run: Run) -> nn.Module:
    """Get the tuned model out of a run's folder, ready to evaluate; `AdapterError` if there is none.

    The one way to a tuned model: a run that has just been trained is measured on it too, without the autocast and the
    last bits of the model in memory, so that its figures are those that everybody finds.
    """
    config, tuned = recipe.config, run.tuned(recipe.config)
    if not tuned.is_dir():
        if run.is_finished and run.result.diverged:
            raise AdapterError(f"{run.folder}: {run.result.diverged}")
        raise AdapterError(
            f"{run.folder}: the run is not finished: it has no {tuned.name}/. Continue it with --resume."
        )
    set_seed(config.seed)
    return _ready(recipe.load(tuned))


def load_base(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe of a run's folder and the model before training, ready to evaluate.

    A new head has the random numbers of the run's seed. `overrides` as for `load_run`.
    """
    recipe = recipe_of(Run.open(folder), overrides)
    set_seed(recipe.config.seed)
    return recipe, _ready(recipe.build_model())


def recipe_of(run: Run, overrides: Iterable[str] = ()) -> Recipe:
    """Get the recipe of a run's folder, without any model."""
    quiet_libraries()
    config = run.config(overrides)
    return recipe_class(config.recipe)(config)


def _ready(model: nn.Module) -> nn.Module:
    return model.to(join().device).eval()

"""A run's model again, as it was before and after: to evaluate it, to let it write, to look at it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from ..errors import AdapterError
from ..recipes.recipe import Recipe
from ..recipes.table import recipe_class
from ..training.loop import quiet_libraries
from ..tuner import load_attached
from .folder import Run


def load_run(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe and the tuned model of a run's folder, ready to evaluate; `AdapterError` if it was not finished.

    `overrides` may change what is evaluated (`evaluation.x=…`), nothing else.
    """
    run = Run.open(folder)
    recipe = _recipe(run, overrides)
    config, tuned = recipe.config, run.tuned(recipe.config)
    if not tuned.is_dir():
        raise AdapterError(f"{folder}: the run is not finished: there is no {tuned.name}/. Continue it with --resume.")
    set_seed(config.seed)
    if config.adapter_options is None:
        model = recipe.build_model(tuned)
    else:
        model = load_attached(recipe.build_model(), tuned)
    return recipe, _ready(model)


def load_base(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe of a run's folder and the model that the run began with, ready to evaluate: what was before.

    A new head has the random numbers that the run's seed gave it. `overrides` as for `load_run`.
    """
    recipe = _recipe(Run.open(folder), overrides)
    set_seed(recipe.config.seed)
    return recipe, _ready(recipe.build_model())


def _recipe(run: Run, overrides: Iterable[str]) -> Recipe:
    quiet_libraries()
    config = run.config(overrides)
    return recipe_class(config.recipe)(config)


def _ready(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

"""Training examples of runs, drawn by a fixed seed: for a merge, and for an adapter that leaves other tasks alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import OptionError
from ..recipes.recipe import Recipe
from ..training.config import RunConfig
from ..training.processes import join
from .folder import Run
from .load import recipe_of, reloaded

# Examples of each run, drawn with this seed. Chosen.
EXAMPLES, SEED = 256, 0


def examples_of(run: str | Path, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Get batches of a run's training examples without labels, drawn by a fixed seed.

    Of a pipeline they are what the module with the adapter (the UNet) is called with for them, which needs the run's
    own text encoder and word.
    """
    opened = Run.open(run)
    recipe = recipe_of(opened)
    model = reloaded(recipe, opened) if recipe.in_pipeline else nn.Module()
    batches = batches_of(recipe, count, recipe.config.training.batch_size)
    return [recipe.seen(model, batch) for batch in batches]


def is_pipeline(run: str | Path) -> bool:
    """Ask whether the module with a run's adapter gets its inputs from other parts of a pipeline."""
    return recipe_of(Run.open(run)).in_pipeline


def pipeline_base(run: str | Path, prompts: Sequence[str] = ()) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Get the untouched module that a pipeline's adapter is on, and what it is called with while it draws prompts."""
    recipe = recipe_of(Run.open(run))
    model = recipe.build_model().to(join().device).eval()
    return recipe.carrier(model), recipe.seen_while_drawing(model, prompts) if prompts else []


def batches_of(recipe: Recipe, count: int, size: int) -> list[dict[str, Any]]:
    """Get batches of a recipe's training examples, drawn by a fixed seed."""
    rows = recipe.plain_rows("train")
    drawn = by_length(rows, random.Random(SEED).sample(range(len(rows)), min(count, len(rows))))
    return [recipe.collate([rows[i] for i in drawn[at : at + size]]) for at in range(0, len(drawn), size)]


def by_length(rows: Any, places: list[int]) -> list[int]:
    """Get the places of texts by their numbers of tokens; those of pictures, which would have to be read, as given."""
    texts = isinstance(rows, list) and bool(places) and "input_ids" in rows[places[0]]
    return sorted(places, key=lambda i: len(rows[i]["input_ids"])) if texts else places


def refuse_other_bases(config: RunConfig) -> None:
    """Raise `OptionError` if a run in `training.away_from` has another base: its tokens mean something else."""
    for folder in config.training.away_from:
        theirs = Run.open(folder).config()
        if (theirs.model, theirs.revision) != (config.model, config.revision):
            raise OptionError(
                f"training.away_from: {folder} was trained on {theirs.model}, and this run trains {config.model}. Name "
                f"runs on the same base."
            )


def batches_of_others(config: RunConfig) -> list[dict[str, Any]]:
    """Get batches of examples of the runs in `training.away_from`, this process's share of them."""
    processes = join()
    found = [batch for folder in config.training.away_from for batch in examples_of(folder)]
    return found[processes.process_index :: processes.num_processes]

"""`look`: a trained model looked at for its page: how far its weights moved, and what it answers."""

from __future__ import annotations

from typing import Any

from ..recipes.recipe import Recipe
from ..training.rates import method_of
from .result import Example, RunResult, Size
from .spectra import layer_spectra
from .updates import layer_updates

# Held-out examples whose answers are shown. Chosen.
MOST_EXAMPLES = 12


def look(result: RunResult, recipe: Recipe, model: Any) -> RunResult:
    """Get the result with spectra, updates, sizes and answers in it.

    Every process of a distributed run calls this: a sharded model answers only where all of them ask it.
    """
    config = recipe.config
    split = next((split for split in ("validation", "test") if split in recipe.splits), None)
    answers = recipe.answers(model, split, MOST_EXAMPLES) if split else []
    adapted = config.adapter_options is not None
    spectral = adapted and "method" in config.adapter_options
    name = f"{method_of(config)} adapter" if spectral else method_of(config)
    return result.model_copy(
        update={
            "looked_at": True,
            "sizes": [
                Size(name=name, trainable=result.trainable, file_bytes=result.file_bytes),
                Size(name="the whole model", trainable=result.total),
            ],
            "spectra": layer_spectra(model) if spectral else [],
            "updates": layer_updates(model) if adapted else [],
            "examples": [Example(text=a.text, expected=a.expected, predicted=a.predicted) for a in answers],
        }
    )

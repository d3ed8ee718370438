"""`look`: analyse a trained model for its page: how far its weights moved, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..recipes.recipe import Recipe
from ..training.rates import method_of
from .folder import Run
from .result import Example, RunResult, Size
from .spectra import layer_spectra
from .updates import layer_updates

# Held-out examples whose answers are shown. Chosen.
MOST_EXAMPLES = 12


def look(result: RunResult, recipe: Recipe, model: Any) -> RunResult:
    """Get the result with spectra, updates, sizes and answers added.

    Every process of a distributed run calls this, since a sharded model needs all of them.
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
                *_parts(result.parts, Run(Path(result.folder)).tuned(config)),
                Size(name="the whole model", trainable=result.total),
            ],
            "spectra": layer_spectra(model) if spectral else [],
            "updates": layer_updates(model) if adapted else [],
            "examples": [Example(text=a.text, expected=a.expected, predicted=a.predicted) for a in answers],
        }
    )


def _parts(parts: Mapping[str, int], tuned: Path) -> list[Size]:
    """Get the size of each part of an adapter with several."""
    found = []
    for name, trainable in parts.items():
        files = [*(tuned / name).glob("*.safetensors"), *tuned.glob(f"{name}.safetensors")]
        size = sum(path.stat().st_size for path in files) if files else None
        found.append(Size(name=name, trainable=trainable, file_bytes=size))
    return found

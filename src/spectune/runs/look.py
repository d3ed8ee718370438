"""`look`: analyse a trained model for its page: how far its weights moved, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter import is_cut
from ..recipes.recipe import Recipe
from ..training.rates import method_of
from .folder import Run
from .result import Confusion, Example, RunResult, Sample, Size
from .spectra import layer_spectra
from .updates import layer_updates

# Held-out examples whose answers are shown; texts that a language model writes before and after. Chosen.
MOST_EXAMPLES, MOST_SAMPLES = 12, 4


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
            "spectra": layer_spectra(model) if spectral and not any(map(is_cut, model.parameters())) else [],
            "updates": layer_updates(model) if adapted else [],
            "confusion": _confusion(recipe, model),
            "samples": [Sample(**vars(s)) for s in recipe.samples(model, split, MOST_SAMPLES)] if split else [],
            "examples": [Example(text=a.text, expected=a.expected, predicted=a.predicted) for a in answers],
        }
    )


def _confusion(recipe: Recipe, model: Any) -> Confusion | None:
    """Get it for the split of the run's main figure."""
    split = next((split for split in ("test", "validation") if split in recipe.splits), None)
    found = recipe.confusion(model, split) if split else None
    return None if found is None or split is None else Confusion(split=split, labels=found[0], counts=found[1])


def _parts(parts: Mapping[str, int], tuned: Path) -> list[Size]:
    """Get the size of each part of an adapter with several."""
    found = []
    for name, trainable in parts.items():
        files = [*(tuned / name).glob("*.safetensors"), *tuned.glob(f"{name}.safetensors")]
        size = sum(path.stat().st_size for path in files) if files else None
        found.append(Size(name=name, trainable=trainable, file_bytes=size))
    return found

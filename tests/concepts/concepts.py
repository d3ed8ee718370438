"""A tiny pipeline with pictures of a concept, and runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectune.concepts.text_to_image import ATTENTION, CONVOLUTIONS, TEXT_ATTENTION
from spectune.recipes import parse_config

TEXT = {"method": "spectral_a", "r": 2, "target_modules": TEXT_ATTENTION}
NO_WORD = {"token": None, "initial_word": None}


def concept_home(folder: Path) -> Path:
    """Get a folder with an untrained pipeline in base/ and pictures with captions in dax/."""
    from examples.glyphs.base import fresh_pipeline
    from examples.glyphs.concepts import write_concept

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh_pipeline().save_pretrained(folder / "base")
    write_concept("<dax>", folder / "dax", count=3)
    return folder


def run_values(home: Path, **told: Any) -> dict[str, Any]:
    """Get a run of three steps; `told` goes over it, section by section, and replaces adapters."""
    rates = {"learning_rate": 1e-2, "text_encoder_learning_rate": 1e-2, "head_learning_rate": 1e-1}
    found: dict[str, Any] = {
        "recipe": "text_to_image",
        "model": str(home / "base"),
        "data": {"train": str(home / "dax")},
        "word": {"token": "<dax>", "initial_word": "shape"},
        "adapter": {
            "unet": {"method": "spectral_a", "r": 2, "target_modules": [*ATTENTION, *CONVOLUTIONS]},
            "text_encoder": TEXT,
        },
        "training": {"steps": 3, "warmup": 1, **rates},
        "prior": {},
        "drawings": {"prompts": ["a {token} on the left", "a red star on the right"], "every": 2, "steps": 2},
    }
    for name, value in told.items():
        merges = isinstance(value, dict) and name != "adapter"
        found[name] = found[name] | value if merges else value
    return found


def config_of(home: Path, **told: Any) -> Any:
    """Get the checked configuration of `run_values`."""
    return parse_config(run_values(home, **told))


def concept_run(folder: Path, **more: Any) -> dict[str, Any]:
    """The values of a small run with held-out pictures, as `tests.recipes.tiny` has them for other recipes."""
    home, data = concept_home(folder), more.pop("data", {})
    pictures = {"validation": str(home / "dax"), "test": str(home / "dax")}
    known = {name: value for name, value in data.items() if name in ("validation", "test", "masks") and value}
    prior = {"prompts": ["a shape"], "images": 2}
    return run_values(home, data=pictures | known, prior=prior, **more)

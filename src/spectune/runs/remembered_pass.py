"""The pass over a run's examples, and the cache that spares it the next run with the same model and examples."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint import BASIS_KIND, fingerprint
from ..recipes.recipe import Recipe
from ..spectrum import DataSpectra, all_have, as_the_first, is_first, open_cache, processes
from ..tuner import AWAY_SHARE, SpectralConfig, layers_of, prepare, wanted

# What of a run's configuration does not change the pass, or is known by its result: the model and the batches.
OTHERWISE_KNOWN = ("adapter", "data", "evaluation", "model", "revision", "seed", "training")


def remembered(
    recipe: Recipe,
    model: nn.Module,
    config: SpectralConfig,
    batches: list[dict[str, torch.Tensor]],
    away: list[dict[str, torch.Tensor]] | None = None,
) -> SpectralConfig:
    """Get the config with the directions that the batches choose: from the cache of `svd.cache_dir`, or by a pass.

    As with the bases of weights, nothing is stored unless the config names a cache. What examples choose beyond
    directions (places, sizes) is chosen anew in each run. The directions keep away from the inputs of `away`, if given.
    """
    more = config.budget is not None or config.build_method().needs_examples()
    named = config.svd_options.cache_dir  # without it nothing is stored, so nothing need be looked for
    cache = None if more or named is None else open_cache(named)
    question = as_the_first("" if cache is None else _question(recipe, model, config, [*batches, *(away or [])]))
    found = None if cache is None else cache.find_data(question)
    if all_have(found is not None):
        assert found is not None
        return with_spectra(config, found, "read from the cache")
    started = time.perf_counter()
    prepared = prepare(model, config, batches, loss=recipe.loss, away_from=away, away_share=_share(recipe))
    assert prepared.spectra is not None
    examples = sum(len(next(iter(batch.values()))) for batch in batches)
    others = len(recipe.config.training.away_from)
    beside = f", away from {others} other run{'s' * (others > 1)}" if others else ""
    prepared.spectra.said = f"found in {examples} examples{beside}, in {time.perf_counter() - started:.1f} s"
    if cache is not None and is_first():
        cache.store_data(question, prepared.spectra)
    return prepared


def _share(recipe: Recipe) -> float:
    return recipe.config.training.away_share or AWAY_SHARE


def with_spectra(config: SpectralConfig, found: DataSpectra, said: str) -> SpectralConfig:
    """Get a copy of the config with these directions."""
    prepared = copy.copy(config)
    prepared.spectra, found.said = found, said
    return prepared


def directions_said(model: nn.Module) -> str:
    """Get where the directions of a model's adapters come from, unless that is the weight."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    found = [config for config in configs.values() if getattr(config, "spectra", None) is not None]
    return ", ".join(f"{config.directions} ({config.spectra.said})" for config in found)


def _question(recipe: Recipe, model: nn.Module, config: SpectralConfig, batches: list[dict[str, torch.Tensor]]) -> str:
    """Get the identity of everything that the directions depend on."""
    known = [BASIS_KIND, type(recipe).__name__, type(model).__name__, config.directions, str(processes())]
    known += [f"{name} {fingerprint(tensor)}" for name, tensor in model.state_dict().items()]
    known += [f"{name} {fingerprint(tensor)}" for batch in batches for name, tensor in sorted(batch.items())]
    known += [f"{name} {seen[:2]}" for name, seen in sorted(wanted(layers_of(model, config), config).items())]
    known.append(f"away {_share(recipe) if recipe.config.training.away_from else None}")
    rest = {name: value for name, value in recipe.config.plain().items() if name not in OTHERWISE_KNOWN}
    return hashlib.sha256("\n".join([*known, json.dumps(rest, sort_keys=True)]).encode()).hexdigest()

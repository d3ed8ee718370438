"""PEFT's parametrised cases, each asked of a `SpectralConfig` instead: same models, same layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import peft

from spectune import SpectralConfig

# What a case says of the model and not of a method.
SHARED = (
    "task_type", "target_modules", "exclude_modules", "modules_to_save", "bias", "layers_to_transform",
    "layers_pattern", "inference_mode",
)  # fmt: skip
# Fields of a row that hold options, and the start that their tests take for granted: where there is one config, they
# turn the identity start off themselves.
RANDOM: dict[str, Any] = {"init_weights": False}
OWN: dict[str, dict[str, Any]] = {
    "config_kwargs": {}, "mandatory_kwargs": {}, "config_kwargs_1": RANDOM, "config_kwargs_2": RANDOM,
}  # fmt: skip
# Methods whose cases target layers that have no weight matrix, or none at all.
ELSEWHERE = (peft.LNTuningConfig, peft.TrainableTokensConfig, peft.PromptLearningConfig, peft.OSFConfig)


def spectral(arguments: str | Iterable[str], rows: Iterable[Any], options: dict[str, Any]) -> list[Any] | None:
    """Get the rows of a parametrised test with SpectralConfigs in the place of others; None where it has no configs."""
    names = [name.strip() for name in arguments.split(",")] if isinstance(arguments, str) else list(arguments)
    known = {"config_cls", "config_class", "config", "config0"}
    if not known & set(names):
        return None
    found: dict[str, Any] = {}
    for row in rows:
        values = [row] if len(names) == 1 else list(getattr(row, "values", row))
        for translated in _translated(dict(zip(names, values, strict=True)), options):
            row_ = tuple(translated[name] for name in names)
            found.setdefault(_key(row_), row_[0] if len(names) == 1 else row_)
    return list(found.values())


def _translated(row: dict[str, Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = row.get("config_cls", row.get("config_class"))
    if kind is not None:
        if issubclass(kind, ELSEWHERE):
            return
        own = {name: _options(row[name], options | start) for name, start in OWN.items() if name in row}
        if any(value is None for value in own.values()):
            return
        plain = {name: SpectralConfig for name in row if name in ("config_cls", "config_class")}
        labels = {name: "spectune" for name in row if name in ("test_name", "tuner_method")}
        yield {**row, **own, **plain, **labels}
        return
    configs = {name: value for name, value in row.items() if name.startswith("config")}
    if all(type(value) is peft.LoraConfig for value in configs.values()):
        asked = {name: _options(_given(value), options | RANDOM) for name, value in configs.items()}
        if all(value is not None for value in asked.values()):
            yield row | {name: SpectralConfig(**value) for name, value in asked.items() if value is not None}


def _given(config: Any) -> dict[str, Any]:
    """Get the options of a config that are not its defaults."""
    plain = type(config)()
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in given.items() if value != getattr(plain, name)}


def _options(asked: dict[str, Any], options: dict[str, Any]) -> dict[str, Any] | None:
    """Get a case's options for a SpectralConfig; None for a case that is about a feature of its method alone."""
    if any(isinstance(value, dict) for value in asked.values()):  # one config for each part of a pipeline
        parts = {name: _options(value, options | RANDOM) for name, value in asked.items() if isinstance(value, dict)}
        return parts if all(parts) and len(parts) == len(asked) else None
    if asked.get("target_parameters") or asked.get("trainable_token_indices"):
        return None
    kept = {name: value for name, value in asked.items() if name in SHARED}
    if kept.get("bias") == "lora_only":
        kept["bias"] = "spectune_only"
    return kept | options


def _key(row: tuple[Any, ...]) -> str:
    """Get one word for equal cases, whatever they are called and however a config's sets are ordered."""
    return repr([sorted(v.to_dict().items(), key=str) if isinstance(v, SpectralConfig) else v for v in row])

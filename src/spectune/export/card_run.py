"""What a run's result says for a model card: data, method, rates, figures. Nothing is made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_json
from ..checkpoint.run_folder import ADAPTER, MODEL
from ..errors import SpectuneError
from .card_words import plain, table

RESULT_FILE = "result.json"
# What a result says of a package that was not there.
ABSENT = "not installed"
# Losses of a million steps and some drawings. Chosen.
LIMIT = 2**27


def result_beside(folder: Path) -> dict[str, Any]:
    """Get the result of the run that a folder belongs to; nothing for any other folder."""
    path = folder.parent / RESULT_FILE
    if folder.name not in (ADAPTER, MODEL) or not path.is_file():
        return {}
    try:
        return read_json(path, LIMIT)
    except SpectuneError:
        return {}


def training_lines(result: Mapping[str, Any]) -> list[str]:
    """Get the section on how it was trained."""
    config = _part(result, "config")
    data, training = _part(config, "data"), _part(config, "training")
    adapter = config.get("adapter")
    options = (
        {k: v for k, v in adapter.items() if v is not None and k not in ("method", "peft_type", "svd")}
        if isinstance(adapter, dict)
        else {}
    )
    rows = {
        "task": result.get("task"),
        "data": _data(data),
        "examples used": ", ".join(f"{split} {count}" for split, count in _part(data, "limit").items()),
        "method": result.get("method"),
        "options": ", ".join(f"{name}={_short(value)}" for name, value in options.items()),
        "quantised base": None if config.get("quantization") == "none" else config.get("quantization"),
        "trained numbers": _count(result.get("trainable")),
        "and a head of": _count(result.get("head") or None),
        "numbers of the base": _count(result.get("total")),
        "steps": len(result.get("losses") or ()),
        "batch": _batch(training),
        "learning rate": result.get("learning_rate"),
        "seed": config.get("seed"),
        "precision": training.get("precision"),
        "directions": result.get("directions"),
        "device": result.get("device"),
        "versions": ", ".join(
            f"{name} {found}" for name, found in _part(result, "versions").items() if found != ABSENT
        ),
    }
    return ["## Training", "", *table(rows)]


def result_lines(result: Mapping[str, Any], spread: Mapping[str, Any] | None = None) -> list[str]:
    """Get the section of figures: of this run, and of the same method over the seeds of a sweep, if given."""
    lines = ["## Results", ""]
    rows = [
        f"| {plain(split)} | {plain(name)} | {value:.4g} |"
        for split, figures in _part(result, "metrics").items()
        for name, value in (figures.items() if isinstance(figures, dict) else ())
        if isinstance(value, (int, float))
    ]
    lines += ["| split | metric | value |", "| --- | --- | ---: |", *rows, ""] if rows else ["Not evaluated.", ""]
    if said := result.get("diverged"):
        lines += [f"**The run diverged**: {plain(said)}", ""]
    for split, why in _part(result, "unmeasured").items():
        lines += [f"Not measured on {plain(split)}: {plain(why)}", ""]
    for metric in (entry for entry in result.get("compared") or () if isinstance(entry, dict)):
        words = (metric.get("name"), metric.get("value"), metric.get("note") or "")
        lines += [f"For comparison: {' '.join(map(plain, words)).rstrip()}", ""]
    lines += spread_lines(spread) if spread else ["One run with one seed: the spread over seeds is not known.", ""]
    if not (spread or {}).get("forgetting"):
        lines += ["What the base forgot was not measured.", ""]
    return lines


def spread_lines(spread: Mapping[str, Any]) -> list[str]:
    """Get the figures over several seeds: mean, standard deviation, and the seeds."""
    lines = [
        f"Over the seeds {plain(', '.join(map(str, spread['seeds'])))} of a sweep, at rate {plain(spread['rate'])}:",
        "",
    ]
    lines += ["| split | metric | mean | standard deviation | runs |", "| --- | --- | ---: | ---: | ---: |"]
    for split, name, mean, deviation, runs in spread["metrics"]:
        lines.append(f"| {plain(split)} | {plain(name)} | {mean:.4g} | {deviation:.2g} | {runs} |")
    if spread.get("forgetting"):
        mean, deviation = spread["forgetting"]
        lines += ["", f"Forgetting: the loss on general text rose by {mean:.3g} ± {deviation:.2g} nats a token."]
    return [*lines, ""]


def datasets(result: Mapping[str, Any]) -> list[str]:
    """Get the hub names of the data."""
    hub = _part(_part(result, "config"), "data").get("hub")
    return [hub] if isinstance(hub, str) else []


def metric_names(result: Mapping[str, Any]) -> list[str]:
    """Get the names of the metrics that are figures."""
    found = {name for figures in _part(result, "metrics").values() if isinstance(figures, dict) for name in figures}
    return sorted(found - {"loss"})


def _part(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = said.get(name)
    return found if isinstance(found, dict) else {}


def _data(data: Mapping[str, Any]) -> str:
    """Get a hub name with its splits, or the names of files without the folders of this machine."""
    splits = {split: str(data[split]) for split in ("train", "validation", "test") if data.get(split)}
    if data.get("hub"):
        return f"{data['hub']} ({', '.join(filter(None, [str(data.get('hub_config') or ''), *splits.values()]))})"
    return ", ".join(f"{split}: {file_name(file)}" for split, file in splits.items())


def file_name(path: str) -> str:
    """Get the last part of a path of any system."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _batch(training: Mapping[str, Any]) -> str | None:
    size, times = training.get("batch_size"), training.get("gradient_accumulation")
    return None if size is None else f"{size}" if times in (1, None) else f"{size} × {times}"


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = file_name(text) if "/" in text or "\\" in text else text
    return text if len(text) <= 80 else f"{text[:80]} […]"

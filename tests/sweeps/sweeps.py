"""Small sweeps, and records without runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectune.runs import RunResult
from spectune.sweeps import SweepRecord
from spectune.sweeps.worker import main
from spectune.sweeps.workers import Workers
from tests.recipes import tiny


def text_sweep(folder: Path, **more: Any) -> dict[str, Any]:
    """Two ways of tuning a tiny encoder; `more` replaces keys of the sweep."""
    run = tiny.text_run(folder, training={"steps": 2, "batch_size": 4, "save_every": 2})
    run["data"]["test"] = tiny.reviews(folder / "test.jsonl", 8)
    del run["adapter"], run["training"]["learning_rate"]
    spectral = {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]}
    methods = {
        "spectral_a": {"adapter": spectral, "learning_rates": [1e-3, 1e-2]},
        "full": {"adapter": "none", "learning_rates": [1e-3]},
    }
    return {"title": "Tiny", "run": run, "methods": methods, "seeds": [0, 1], "tuning_seeds": 1} | more


def in_this_process(workers: Workers, job: Path, log: Path, on_step: Callable[..., None]) -> int:
    """In place of `Workers.run`: a process of its own costs seconds."""
    log.write_text("")
    return main(json.loads(job.read_text()))


def record(method: str = "a", rate: float = 1e-3, seed: int = 0, **more: Any) -> SweepRecord:
    """A finished run that never was; `validation` and `test` are accuracies."""
    metrics = {"validation": {"accuracy": more.pop("validation", 0.5)}, "test": {"accuracy": more.pop("test", 0.5)}}
    training = {"batch_size": 4, "gradient_accumulation": 1, "max_grad_norm": 1.0, "optimizer": "adamw_torch"}
    training |= {"weight_decay": 0.0, "schedule": "linear", "precision": "float32"}
    config = {"model": "m/base", "dtype": "float32", "data": {}, "training": training, "adapter": {"method": "svft"}}
    found: dict[str, Any] = {
        "config": config, "metrics": metrics, "losses": [0.5] * 10, "trainable": 100, "total": 1000,
        "learning_rate": rate, "step_seconds": 0.1, "peak_bytes": 2**20, "file_bytes": 400, "device": "cpu",
    }  # fmt: skip
    found |= {
        name: more.pop(name)
        for name in list(more)
        if name in RunResult.model_fields and name not in SweepRecord.model_fields
    }
    values = {"task": "task", "method": method, "kind": "svft", "rate": rate, "seed": seed, "config": config}
    result = None if "error" in more else RunResult(**found)
    return SweepRecord(**(values | {"result": result} | more))

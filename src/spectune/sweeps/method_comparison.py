"""The runs of a sweep in the form of PEFT's `method_comparison`, to compare them with its results.

The form is that of huggingface/peft, method_comparison/MetaMathQA/results/*.json (run_info, train_info, meta_info),
as its processing.py reads it. Figures that a sweep does not measure are -1 if that reader needs an integer.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .choice import chosen_rate
from .config import SweepConfig, metric_of
from .record import SweepRecord
from .summary import REPORTED

NOT_MEASURED = -1
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "spectune")


def write_method_comparison(sweep: SweepConfig, records: Sequence[SweepRecord], folder: Path) -> list[Path]:
    """Write one JSON for each run at its method's chosen rate into `folder/TASK/`, and get the paths."""
    written = []
    for task in sweep.tasks:
        for method in sweep.methods:
            mine = [r for r in records if (r.task, r.method) == (task, method)]
            rate = chosen_rate(mine, sweep.metric)
            scored = [r for r in mine if r.ok and r.rate == rate and any(part in r.metrics for part in REPORTED)]
            for record in scored:
                path = folder / task / f"{method}--{Path(record.config['model']).name}-seed{record.seed}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(as_method_comparison(sweep, record), indent=2) + "\n")
                written.append(path)
    return written


def as_method_comparison(sweep: SweepConfig, record: SweepRecord) -> dict[str, Any]:
    """Get one run in PEFT's form; `test accuracy` is the sweep's reported metric, with its name."""
    config = record.config
    metric, test = metric_of(record.metrics, REPORTED, sweep.report or sweep.metric)
    measured = record.metrics.get("validation")
    name, value = metric_of(record.metrics, ("validation",), sweep.metric) if measured else ("", None)
    validation = {f"valid {name}": value} if measured else {}
    peak = NOT_MEASURED if record.found.peak_bytes is None else record.found.peak_bytes
    samples = record.found.steps * config["training"]["batch_size"] * config["training"]["gradient_accumulation"]
    last = {
        "step": record.found.steps,
        "test accuracy": test,
        "train loss": record.final_loss,
        "train samples": samples,
        "train total tokens": NOT_MEASURED,
    }
    return {
        "run_info": {
            "created_at": record.created,
            "total_time": record.seconds,
            "experiment_name": f"{record.method}/{Path(config['model']).name}-{record.task}-seed{record.seed}",
            "peft_branch": "main",
            "train_config": _train_config(record),
            "peft_config": _peft_config(record),
            "error_msg": record.error,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": NOT_MEASURED,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": NOT_MEASURED,
            # The median step times the steps: without evaluation and saving, as in PEFT.
            "train_time": (record.found.step_seconds or 0.0) * record.found.steps,
            "file_size": record.found.file_bytes,
            "num_trainable_params": record.found.trainable + record.found.head,
            "num_total_params": record.found.total,
            "status": ("success" if record.ok else "failed"),
            "metrics": [
                {"step": record.found.steps, **validation, "train loss": record.final_loss},
                last | ({} if record.forgetting is None else {"forgetting": record.forgetting}),
            ],
        },
        "meta_info": _meta_info(record) | {"spectune": {"metric": metric, "memory_of": record.found.device}},
    }


def _train_config(record: SweepRecord) -> dict[str, Any]:
    config, training = record.config, record.config["training"]
    return {
        "model_id": config["model"],
        "dtype": config["dtype"],
        "max_seq_length": config["data"].get("max_tokens"),
        "batch_size": training["batch_size"],
        "max_steps": record.found.steps,
        "seed": record.seed,
        "grad_norm_clip": training["max_grad_norm"],
        "optimizer_type": training["optimizer"],
        "optimizer_kwargs": {"lr": record.rate, "weight_decay": training["weight_decay"]},
        "lr_scheduler": training["schedule"],
        "use_amp": training["precision"] != "float32",
    }


def _peft_config(record: SweepRecord) -> dict[str, Any] | None:
    adapter = record.config["adapter"]
    if not isinstance(adapter, dict):
        return None
    return {"peft_type": "SPECTUNE" if "method" in adapter else adapter["peft_type"]} | adapter


def _meta_info(record: SweepRecord) -> dict[str, Any]:
    versions: Mapping[str, Any] = record.provenance.get("versions", {})
    packages: dict[str, Any] = {}
    for name in PACKAGES:
        packages |= {f"{name}-version": versions.get(name), f"{name}-commit-hash": None}
    packages["spectune-commit-hash"] = record.provenance.get("commit")
    names = ("system", "release", "version", "machine", "processor")
    return {
        "model_info": {"sha": record.config.get("revision"), "created_at": None},
        "dataset_info": {},
        "package_info": packages,
        "system_info": {name: getattr(platform, name)() for name in names} | {"accelerator": record.found.device},
        "pytorch_info": "",
    }

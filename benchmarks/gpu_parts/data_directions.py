"""Part h: directions of the data on a 1B decoder: what the pass over examples costs, and a step of the dense core."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from spectune import SpectralConfig, prepare

from .llama import FLOOR, LORA, TARGETS, adapted, adapters, llama, loss_of, sharing, tokens
from .notebook import Notebook, Setting
from .timing import peak_mib, synchronize
from .training_step import Bench, Cell, R

KINDS = ("gradient", "activation", "weight_x_activation")
# As the recipes pass them by default: 16 batches. Chosen there.
BATCHES = 16


def equal_core(base: nn.Module) -> int:
    """Get the size of the dense core that trains as many numbers as LoRA of rank R, over all targets."""
    layers = [m for path, m in base.named_modules() if path.rpartition(".")[2] in TARGETS]
    trained = sum(R * (layer.in_features + layer.out_features) for layer in layers)  # type: ignore[operator]
    return int((trained / len(layers)) ** 0.5)


def core(directions: str, size: int) -> SpectralConfig:
    return SpectralConfig(
        method="svft", pattern="dense", basis_rank=size, directions=directions, target_modules=TARGETS
    )


def passed(
    setting: Setting, base: nn.Module, config: SpectralConfig, count: int
) -> tuple[SpectralConfig, dict[str, Any]]:
    """Get the config with its directions, and what finding and attaching them took."""
    batches = [{"input_ids": tokens(count, 32 if setting.tiny else 2048, setting)} for _ in range(BATCHES)]
    model = sharing(base).requires_grad_(False)
    synchronize(setting)
    started = time.perf_counter()
    prepared = prepare(model, config, batches, loss=lambda one, batch: loss_of(one, batch["input_ids"]))
    synchronize(setting)
    passing = time.perf_counter() - started
    started = time.perf_counter()
    adapted(base, prepared)
    synchronize(setting)
    attaching = time.perf_counter() - started
    peak = peak_mib(setting, lambda: prepare(model, config, batches[:1], loss=lambda m, b: loss_of(m, b["input_ids"])))
    return prepared, {
        "pass_seconds": round(passing, 3),
        "attach_seconds": round(attaching, 3),
        "batches": BATCHES,
        "peak_mib": peak,
    }


def run(setting: Setting, notebook: Notebook) -> None:
    shape, count = ("tiny", 64) if setting.tiny else ("1B", 2048)
    base = llama(shape, setting)
    size = equal_core(base)
    notebook.note("core", size)
    cell = Cell(shape, count)
    names = [FLOOR, LORA, "svft, dense core"]
    notebook.plan([f"{shape}: pass for {kind}" for kind in KINDS] + [f"{cell.name}: {name}" for name in names])
    configs: dict[str, Any] = {name: adapters(R)[name] for name in (FLOOR, LORA)}
    for kind in KINDS:
        found = notebook.attempt(
            f"{shape}: pass for {kind}", lambda k=kind: passed(setting, base, core(k, size), count)
        )
        if found is not None:
            configs.setdefault(names[-1], found[0])
            notebook.put(f"{shape}: pass for {kind}", found[1])
    if setting.on_cuda:
        torch.cuda.empty_cache()
    Bench(setting, notebook, shape, base, configs).measure(cell, names)

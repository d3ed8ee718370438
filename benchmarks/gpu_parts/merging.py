"""Part i: merging five LoRAs of a decoder, from their files: a rule without data, and `match` behind the model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spectune.fusion import fuse

from .llama import TARGETS, llama, sharing, tokens
from .notebook import Notebook, Setting
from .timing import synchronize
from .training_step import R

ADAPTERS = 5
# `match` sees 64 examples of each task; the docs of fusion advise 64 to 256.
BATCHES = 4
RULES = ("task_singular", "match")
SIZE = 0.01  # of a factor's numbers; only their shapes cost time


def write_loras(base: nn.Module, folder: Path) -> list[Path]:
    """Write random LoRAs of all targets as PEFT does."""
    model = get_peft_model(sharing(base), LoraConfig(r=R, target_modules=TARGETS))  # type: ignore[arg-type]
    factors = [tensor for name, tensor in model.named_parameters() if "lora_" in name]
    for seed in range(ADAPTERS):
        random = torch.Generator(factors[0].device).manual_seed(seed)
        for factor in factors:
            factor.detach().normal_(0.0, SIZE, generator=random)
        model.save_pretrained(folder / str(seed))
    return [folder / str(seed) for seed in range(ADAPTERS)]


def merged(setting: Setting, base: nn.Module, loras: list[Path], rule: str, count: int) -> dict[str, Any]:
    """Get what one merge takes, reading included."""
    data: dict[str, Any] = {}
    if rule == "match":
        batch = tokens(count, 32 if setting.tiny else 128, setting)
        data = {"model": base, "examples": [[{"input_ids": batch}] * BATCHES] * ADAPTERS}
    if setting.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    ranks = [delta.left_OP.shape[1] for delta in fuse(loras, rule=rule, **data).deltas.values()]
    synchronize(setting)
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 2), "weights": len(ranks)}
    row |= {"rank": max(ranks)}
    if setting.on_cuda:
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return row


def run(setting: Setting, notebook: Notebook) -> None:
    shape, count = ("tiny", 64) if setting.tiny else ("1B", 2048)
    notebook.note("adapters", ADAPTERS)
    notebook.plan([f"{shape}: {rule}" for rule in RULES])
    base = llama(shape, setting).requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder:
        loras = notebook.attempt("writing LoRAs", lambda: write_loras(base, Path(folder)))
        for rule in RULES if loras is not None else ():
            notebook.row(f"{shape}: {rule}", lambda rule=rule: merged(setting, base, loras, rule, count))

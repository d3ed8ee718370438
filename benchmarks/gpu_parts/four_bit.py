"""Part g: a training step on an NF4 base (QLoRA's): LoRA and spectral adapters, time and memory."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from spectune import SpectralConfig

from .llama import FLOOR, LORA, TARGETS, llama
from .notebook import Notebook, NotHere, Setting
from .training_step import Bench, Cell, R

# Directions of the dense core. Chosen.
BASIS = 128


def adapters() -> dict[str, Any]:
    """Get what is laid side by side; None is the frozen model."""
    place: dict[str, Any] = {"target_modules": TARGETS}
    return {
        FLOOR: None,
        LORA: LoraConfig(r=R, **place),
        "spectral_a": SpectralConfig(method="spectral_a", r=R, **place),
        "svft, dense core": SpectralConfig(method="svft", pattern="dense", basis_rank=BASIS, **place),
    }


def quantised(model: nn.Module, setting: Setting) -> nn.Module:
    """Get the model with each target's weight in NF4, computing in bfloat16."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except (ImportError, RuntimeError) as error:
        raise NotHere(f"bitsandbytes cannot be imported: {error}") from error
    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            inputs, outputs = layer.in_features, layer.out_features
            packed = Linear4bit(
                inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
            )
            packed.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4").to(setting.device)
            model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by this, PEFT chooses LoRA's layer for it
    return model


def run(setting: Setting, notebook: Notebook) -> None:
    shape = "tiny" if setting.tiny else "8B"
    cells = [Cell(shape, count) for count in ((64,) if setting.tiny else (2048, 8192))]
    base = quantised(llama(shape, setting), setting)
    if setting.on_cuda:
        torch.cuda.empty_cache()
        notebook.note("base_mib", round(torch.cuda.memory_allocated() / 2**20))
    notebook.plan([f"{cell.name}: {name}" for cell in cells for name in adapters()])
    bench = Bench(setting, notebook, shape, base, adapters())
    for cell in cells:
        bench.measure(cell, list(adapters()))

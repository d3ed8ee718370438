"""Every public name of Spectune, used as the pages say: `mypy --strict` accepts it, in a test and in `make release`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectune
from spectune import (
    METHODS,
    AdapterBank,
    Delta,
    SpectralConfig,
    Spectrum,
    SpectuneError,
    Weight,
    attach_dynamics,
    collect_grams,
    decompose,
    export_gguf,
    export_lora,
    fuse,
    merge_checkpoint,
    prepare,
)


def configure(base: nn.Module, batches: list[dict[str, Any]]) -> SpectralConfig:
    config = SpectralConfig(method="spectral_a", r=8, target_modules=["q_proj", "v_proj"], svd={"solver": "exact"})
    rate: float = METHODS[config.method].learning_rate
    print(spectune.__version__, rate, config.build_method().options())
    gradient = SpectralConfig(method="svft", pattern="banded", basis_rank=64, directions="gradient")
    return prepare(base, gradient, batches)


def factor(W_OI: torch.Tensor) -> torch.Tensor:
    spectrum: Spectrum = decompose(Weight("layer", W_OI), rank=4, solver="exact")
    delta = Delta(spectrum.U_OR, torch.ones(4), spectrum.Vh_RI)
    rows, cols = delta.shape
    return delta.core_matrix() * (rows + cols)


def step(model: nn.Module) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return attach_dynamics(optimizer, model, singular_decay=0.1, grad_norm="rms")


def serve(model: nn.Module, folder: Path, x: torch.Tensor) -> None:
    bank = AdapterBank(model)
    bank.load("anna", folder)
    with bank(["anna"]):
        model(x)


def give_away(model: nn.Module, base: Path, adapters: list[Path], batches: list[dict[str, Any]]) -> str:
    try:
        exported = export_lora(model, "lora", overwrite=True)
        merged = merge_checkpoint(base, adapters[0], "merged")
        file: Path = export_gguf(adapters[0], "gguf", base_model=base, dtype=torch.float16).path
        grams = [collect_grams(model, batches) for _ in adapters]
        fused = fuse(adapters, rule="gradient", base=base, activations=grams)
        saved = fused.save("fused", as_lora=True)
    except SpectuneError as error:
        return str(error)
    return f"{exported.max_rank} {merged.worst_rounding} {file} {fused.report} {saved}"

"""Updates of one layer as the rules get them, in float64, and saved adapters of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spectune import SpectralConfig
from spectune.fusion import Part
from spectune.methods import build_method
from spectune.records import Delta, Weight
from spectune.spectrum import decompose

from ..models import MODELS

ROWS, COLS = 24, 18
DTYPE = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def weight(seed: int = 100) -> torch.Tensor:
    return random(ROWS, COLS, seed=seed)


def inputs(seed: int, count: int = 40, cols: int = COLS) -> torch.Tensor:
    """Rows x_NI of one concept; 40 of them span all of the 18 features."""
    return random(count, cols, seed=1000 + seed)


def spectral_part(
    name: str, columns: tuple[int, ...], seed: int, W_OI: torch.Tensor | None = None, shifts: bool = False
) -> Part:
    W_OI = weight() if W_OI is None else W_OI
    basis = decompose(Weight("layer", W_OI), len(columns), columns=columns, dtype=DTYPE, solver="exact")
    method = build_method("spectral_a", {"r": len(columns), "columns": columns, "train_singular_values": shifts})
    shapes = method.trained_shapes(*W_OI.shape)
    trained = {n: 0.3 * random(*shape, seed=10 * seed + i) for i, (n, shape) in enumerate(shapes.items())}
    x_NI = inputs(seed)
    seen = {"gram_II": x_NI.mT @ x_NI, "cross_II": x_NI.mT @ x_NI, "weight_OI": W_OI}
    return Part(name, "layer", method.delta(basis, trained, {}), method, basis, trained, **seen)


def lora_part(name: str, rank: int, seed: int) -> Part:
    delta = Delta(
        random(ROWS, rank, seed=seed), torch.full((rank,), 0.5, dtype=DTYPE), random(rank, COLS, seed=seed + 1)
    )
    x_NI = inputs(seed)
    return Part(name, "layer", delta, gram_II=x_NI.mT @ x_NI, cross_II=x_NI.mT @ x_NI, weight_OI=weight())


def orthogonal_part(name: str, concept: int, seed: int, basis_seed: int = 0, r: int = 3) -> Part:
    method = build_method("orthogonal_adaptation", {"r": r, "concept": concept, "basis_seed": basis_seed})
    basis = decompose(Weight("layer", weight()), 1, dtype=DTYPE)
    trained = {"B": random(ROWS, r, seed=seed)}
    frozen = {n: t.to(DTYPE) for n, t in method.frozen(basis).items()}
    x_NI = inputs(seed)
    return Part(name, "layer", method.delta(basis, trained, frozen), method, None, trained, x_NI.mT @ x_NI)


def base_folder(folder: Path, model: str = "llama", seed: int = 0) -> Path:
    """Save the tiny model that adapters name as their base."""
    path = folder / f"{model}-{seed}"
    if not path.exists():
        MODELS[model].fresh(seed).save_pretrained(path)
    return path


def save_adapter(
    folder: Path, name: str, config: Any, seed: int, base: Path | None = None, model: str = "llama"
) -> Path:
    """Save an adapter with random trained numbers, on the base of `base_folder`."""
    base = base_folder(folder, model) if base is None else base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(load_base(base, model), config)
        with torch.no_grad():
            for path, parameter in adapted.named_parameters():
                if any(word in path for word in ("lora_", "spectune_adapter", "modules_to_save")):
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder / name)
    return folder / name


def load_base(base: Path, model: str = "llama") -> nn.Module:
    return type(MODELS[model].fresh()).from_pretrained(base).eval()


def spectral(columns: Any, r: int = 3, **more: Any) -> SpectralConfig:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **more}
    return SpectralConfig(r=r, columns=columns, **options)


def lora(r: int, **more: Any) -> LoraConfig:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "lora_alpha": 2 * r, **more}
    return LoraConfig(r=r, **options)

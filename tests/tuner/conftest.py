"""Every method on every tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig, export_lora

from ..models import MODELS, Tiny

# What each method is run with: the smallest form that still has every part.
OPTIONS: dict[str, dict[str, Any]] = {
    "spectral_a": {"r": 3},
    "spectral_r": {"r": 4, "train_singular_values": True},
    "svft": {"pattern": "random", "off_diagonals": 2},
    "specadapt": {"r": 2},
    "one_sided": {"r": 3},
    "svdiff": {},
    "lidb": {"r": 2},
    "orthogonal_adaptation": {"r": 2},
}


@pytest.fixture(params=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_for(tiny: Tiny, method: str, **more: Any) -> SpectralConfig:
    return SpectralConfig(**{"method": method, "target_modules": list(tiny.targets), **OPTIONS[method], **more})


def train(model: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Stand in for training: move every trainable number of the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def adapted(tiny: Tiny, method: str, **more: Any) -> PeftModel:
    """A tiny model with a trained adapter."""
    model = get_peft_model(tiny.fresh(), config_for(tiny, method, **more))
    train(model)
    return model.eval()


def assert_travels(tuned: Any, tiny: Tiny, folder: Path, tolerance: float = 1e-5) -> None:
    """Save an adapter, and see that its file gives the same logits again, and as an exact LoRA."""
    logits = tuned(**tiny.inputs()).logits
    tuned.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(tiny.fresh(), folder / "adapter").eval()
    torch.testing.assert_close(again(**tiny.inputs()).logits, logits, rtol=0, atol=tolerance)
    tiny.fresh().save_pretrained(folder / "base")
    export_lora(folder / "adapter", folder / "lora", base_model=folder / "base")
    as_lora = PeftModel.from_pretrained(tiny.fresh(), folder / "lora").eval()
    torch.testing.assert_close(as_lora(**tiny.inputs()).logits, logits, atol=10 * tolerance, rtol=10 * tolerance)

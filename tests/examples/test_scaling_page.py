"""The table of docs/scaling.md is what its code prints, and the code counts what a model holds."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from peft import get_peft_model

from spectune import SpectralConfig
from spectune.adapter import spectral_modules
from spectune.checkpoint import Target
from spectune.surveys import budget

from ..models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_table_is_what_the_code_prints() -> None:
    page = PAGE.read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "budget(" in block]
    with redirect_stdout(StringIO()) as printed:
        exec(compile(code, str(PAGE), "exec"), {})
    assert printed.getvalue() and printed.getvalue() in page


def test_the_formula_counts_every_byte_that_training_keeps() -> None:
    llama = MODELS["llama"]
    base = llama.fresh()
    weights = sum(t.numel() * t.element_size() for t in [*base.parameters(), *base.buffers()])
    model = get_peft_model(base, SpectralConfig(r=4, target_modules=["q_proj", "up_proj"]))
    shapes = [(name, tuple(layer.base_layer.weight.shape)) for name, layer, _ in _layers(model)]
    cost = next(row for row in budget([Target(n, n, shape, n) for n, shape in shapes], 4) if row.method == "spectral_a")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**llama.inputs()).logits.square().mean().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = [*model.parameters(), *model.buffers(), *gradients, *moments]
    assert sum(t.numel() * t.element_size() for t in held) == weights + cost.frozen_bytes + cost.training_bytes


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    return [(path, model.get_submodule(path), name) for path, name, _ in spectral_modules(model)]

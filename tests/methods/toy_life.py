"""The life of an adapter of the toy method; run by `test_a_new_method.py` in a process of its own."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from spectune import SpectralConfig, export_lora
from tests.models import MODELS

TINY = MODELS["bert"]


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**TINY.inputs()).logits
    return found


def test_the_toy_attaches_trains_saves_loads_and_exports(tmp_path: Path) -> None:
    config = SpectralConfig(method="toy", r=3, wobble=0.7, target_modules=list(TINY.targets))
    model = peft.get_peft_model(TINY.fresh(), config)
    before, numbers = outputs(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(numbers, lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**TINY.inputs()).logits.square().mean().backward()
        optimizer.step()
    trained = outputs(model)
    assert not torch.allclose(before, trained, atol=1e-4), "training moved nothing"
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(TINY.fresh(), str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].wobble == 0.7
    torch.testing.assert_close(outputs(loaded), trained, rtol=0, atol=1e-5)
    native = TINY.fresh()
    native.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(native), trained, rtol=0, atol=1e-5)
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(
        outputs(peft.PeftModel.from_pretrained(TINY.fresh(), str(tmp_path / "lora"))), trained, rtol=0, atol=1e-4
    )


def test_help_shows_the_option_of_the_toy() -> None:
    assert "toy (0.5): How much neighbours mix in the toy." in str(SpectralConfig.__doc__)

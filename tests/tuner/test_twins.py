"""A copy of a live adapter acts as the adapter does: trl's reference `ref`, whose first DPO loss is then ln 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from spectune import SpectralConfig, Spectrum
from spectune.spectrum import obtain
from spectune.tuner import bases

from ..models import MODELS, output
from .conftest import adapted

LLAMA = MODELS["llama"]


def flipped(*args: Any, **kwargs: Any) -> Any:
    """What another solver may find: the same directions, every second with the other sign."""
    return [with_other_signs(found) for found in obtain(*args, **kwargs)]


def with_other_signs(found: Spectrum) -> Spectrum:
    signs_R = 1.0 - 2.0 * (torch.arange(len(found.S_R)) % 2)
    return replace(found, U_OR=found.U_OR * signs_R, Vh_RI=found.Vh_RI * signs_R[:, None])


def copied_as_trl_does(model: PeftModel) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def outputs(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("default", "ref"):
        model.set_adapter(name)
        found[name] = output(model.eval(), LLAMA.inputs())
    with model.disable_adapter():
        found["base"] = output(model, LLAMA.inputs())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_basis", ["auto", "always"])
def test_a_copied_reference_begins_with_the_outputs_of_the_adapter(
    method: str, dtype: torch.dtype, save_basis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(LLAMA, method, save_basis=save_basis).save_pretrained(tmp_path)
    monkeypatch.setattr(bases, "obtain", flipped)
    model = PeftModel.from_pretrained(LLAMA.fresh().to(dtype), tmp_path, is_trainable=True)
    copied_as_trl_does(model)
    found = outputs(model)
    assert torch.equal(found["default"], found["ref"]) and not torch.equal(found["default"], found["base"])
    model.save_pretrained(tmp_path, selected_adapters=["ref"])
    loaded = PeftModel.from_pretrained(LLAMA.fresh().to(dtype), tmp_path / "ref").eval()
    # The basis is rotated a second time, in float32; bfloat16 activations round their sums.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), found["ref"], rtol=0, atol=tolerance)


def test_training_the_adapter_leaves_its_copy() -> None:
    model = adapted(LLAMA, "spectral_r")
    copied_as_trl_does(model)
    before = outputs(model)["ref"]
    model.set_adapter("default")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.requires_grad or tensor.data_ptr() in {
                module_basis.data_ptr() for module_basis in basis_of(model)
            }:
                tensor.mul_(0.5)
    assert torch.equal(outputs(model)["ref"], before)


def basis_of(model: PeftModel) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_buffers() if name.endswith(("default.U_OR", "default.Vh_RI"))]


def test_an_adapter_with_other_directions_finds_its_own() -> None:
    model = adapted(LLAMA, "spectral_a", r=2, columns="top")
    model.add_adapter(
        "other", SpectralConfig(r=2, columns="bottom", target_modules=model.peft_config["default"].target_modules)
    )
    layer = next(module for module in model.modules() if "other" in getattr(module, "spectune_adapter", {}))
    assert not torch.allclose(layer.module("other").S_R, layer.module("default").S_R)

"""Spectral adapters in a diffusion model, and their LoRA in diffusers' own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model

from spectune import METHODS, SpectralConfig, SpectuneError, export_lora

from .conftest import OPTIONS, train

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 2, 8, 8), (2, 3, 12)))
    with torch.no_grad():
        return model(sample, torch.tensor([5, 9]), encoder_hidden_states=text).sample


@pytest.mark.parametrize("method", list(METHODS))
def test_attention_and_convolutions_of_a_unet_are_adapted(method: str, tmp_path: Path) -> None:
    base = output(unet())
    model = get_peft_model(unet(), SpectralConfig(method=method, target_modules=TARGETS, **OPTIONS[method]))
    assert torch.equal(output(model), base)
    train(model, 0.2)
    tuned = output(model)
    assert (tuned - base).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(unet(), tmp_path)), tuned, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(output(model), tuned, rtol=0, atol=1e-4)


def test_diffusers_injects_and_switches_adapters_natively() -> None:
    model = unet()
    base = output(model)
    model.add_adapter(SpectralConfig(target_modules=TARGETS, r=2), adapter_name="mine")
    for name, parameter in model.named_parameters():
        if ".spectune_adapter." in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert not torch.equal(output(model), base)
    model.disable_adapters()
    assert torch.equal(output(model), base)
    model.enable_adapters()
    model.delete_adapters("mine")
    assert torch.equal(output(model), base)


def test_the_exported_lora_loads_in_diffusers(tmp_path: Path) -> None:
    model = get_peft_model(unet(), SpectralConfig(target_modules=["to_q", "to_k", "to_v"], r=2))
    train(model, 0.2)
    export_lora(model, tmp_path / "lora", diffusers="unet")
    plain = unet()
    plain.load_lora_adapter(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    torch.testing.assert_close(output(plain), output(model), rtol=0, atol=1e-5)


def test_an_unknown_part_is_refused_and_a_convolution_has_no_exact_lora_here(tmp_path: Path) -> None:
    model = get_peft_model(unet(), SpectralConfig(target_modules=["to_q"], r=2))
    with pytest.raises(SpectuneError, match="diffusers='unett' is not a part of a pipeline. Did you mean 'unet'"):
        export_lora(model, tmp_path / "lora", diffusers="unett")
    assert list(tmp_path.iterdir()) == []

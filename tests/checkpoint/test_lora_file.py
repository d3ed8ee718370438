"""LoRA files of PEFT, diffusers and kohya's trainer give the updates that their writers apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from spectune.algebra import dense
from spectune.checkpoint import read_lora
from spectune.errors import AdapterError

from ..models import MODELS


def with_lora(model: str, **options: Any) -> Any:
    """A tiny model with a LoRA whose B is not zero."""
    tiny = MODELS[model]
    tuned = get_peft_model(tiny.fresh(), LoraConfig(target_modules=list(tiny.targets), **options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return tuned


def deltas_of(tuned: Any) -> dict[str, torch.Tensor]:
    """PEFT's own dW_OI of every adapted layer."""
    found = {}
    for name, layer in tuned.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            update = layer.get_delta_weight("default")
            turned = getattr(layer, "fan_in_fan_out", False)
            found[name.removeprefix("base_model.model.")] = (update.T if turned else update).detach()
    return found


OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "peft_default": {},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_update_of_a_peft_folder_is_what_peft_applies(options: dict[str, Any], tmp_path: Path) -> None:
    tuned = with_lora("llama", **options)
    tuned.save_pretrained(str(tmp_path))
    file, expected = read_lora(tmp_path), deltas_of(tuned)
    assert file.layers.keys() == expected.keys() and len(expected) == 6
    for name, update in expected.items():
        torch.testing.assert_close(dense(file.delta(name)), update, rtol=1e-5, atol=1e-5)
    assert file.trained_count == sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)


def test_the_file_inside_a_peft_folder_is_read_with_its_config(tmp_path: Path) -> None:
    with_lora("mlp", **OPTIONS["rslora"] | {"lora_alpha": 20}).save_pretrained(str(tmp_path))
    assert read_lora(tmp_path / "adapter_model.safetensors").layers == read_lora(tmp_path).layers
    assert read_lora(tmp_path).layers["lin0"].scaling == 10.0


def test_modules_trained_in_full_are_carried_and_no_layers(tmp_path: Path) -> None:
    with_lora("bert", modules_to_save=["classifier"]).save_pretrained(str(tmp_path))
    file = read_lora(tmp_path)
    assert {name.rpartition("classifier.")[2] for name in file.carried} == {"weight", "bias"}
    assert not any("classifier" in name for name in file.layers)


def test_the_scaling_in_the_header_of_a_diffusers_file_is_read(tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    tuned = with_lora("llama", **OPTIONS["patterns"], lora_alpha=20)
    config = json.loads(json.dumps(tuned.peft_config["default"].to_dict(), default=sorted))
    layers = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(tuned).items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        str(tmp_path), unet_lora_layers=layers, unet_lora_adapter_metadata=config
    )
    file = read_lora(tmp_path)
    for name, update in deltas_of(tuned).items():
        torch.testing.assert_close(dense(file.delta(f"unet.{name}")), update, rtol=1e-5, atol=1e-5)


def kohya_tensors(rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "lora_unet_mid_to_q.lora_down.weight": torch.randn(rank, 6, generator=generator),
        "lora_unet_mid_to_q.lora_up.weight": torch.randn(5, rank, generator=generator),
        "lora_unet_mid_conv.lora_down.weight": torch.randn(rank, 3, 3, 3, generator=generator),
        "lora_unet_mid_conv.lora_up.weight": torch.randn(4, rank, 1, 1, generator=generator),
    }


def test_a_kohya_file_scales_by_its_alpha_and_flattens_kernels(tmp_path: Path) -> None:
    tensors = kohya_tensors() | {"lora_unet_mid_to_q.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_lora(tmp_path / "a.safetensors")
    B_OP, A_PI = tensors["lora_unet_mid_to_q.lora_up.weight"], tensors["lora_unet_mid_to_q.lora_down.weight"]
    torch.testing.assert_close(dense(file.delta("lora_unet_mid_to_q")), B_OP @ A_PI / 2)
    # One convolution after the other: the 3 x 3 down, the 1 x 1 up.
    up, down = tensors["lora_unet_mid_conv.lora_up.weight"], tensors["lora_unet_mid_conv.lora_down.weight"]
    kernel = torch.einsum("orxy,rikl->oikl", up, down)
    torch.testing.assert_close(dense(file.delta("lora_unet_mid_conv")), kernel.flatten(1))
    assert file.layers["lora_unet_mid_conv"].scaling == 1.0 and file.carried == ()


def renamed(old: str, new: str, tensor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tensors = kohya_tensors()
    found = tensors.pop(old)
    return tensors | {new: found if tensor is None else tensor}


DOWN, UP = "lora_unet_mid_to_q.lora_down.weight", "lora_unet_mid_to_q.lora_up.weight"
REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "dora": (kohya_tensors() | {"lora_unet_mid_to_q.dora_scale": torch.ones(5)}, "DoRA"),
    "loha": (kohya_tensors() | {"x.hada_w1_a": torch.ones(5)}, "LoHa"),
    "tucker": (kohya_tensors() | {"lora_unet_mid_conv.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
    "half": (renamed(UP, "x.weight"), "lacks its partner"),
    "no lora": ({"a.weight": torch.ones(2, 2)}, "no pair of factors"),
    "ranks differ": (renamed(UP, UP, torch.ones(5, 3)), "do not fit together as B A"),
    "rank zero": (kohya_tensors() | {DOWN: torch.ones(0, 6), UP: torch.ones(5, 0)}, "do not fit together as B A"),
    "many alphas": (kohya_tensors() | {"lora_unet_mid_to_q.alpha": torch.ones(3)}, "must be a finite number"),
    "nan alpha": (kohya_tensors() | {"lora_unet_mid_to_q.alpha": torch.tensor(float("nan"))}, "finite number"),
    "twice": (
        {"x.lora.down.weight": torch.ones(1, 2), "x.lora.up.weight": torch.ones(2, 1)}
        | {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)},
        "two pairs",
    ),
    "no scaling": (
        {"base_model.model.x.lora_A.weight": torch.ones(1, 2), "base_model.model.x.lora_B.weight": torch.ones(2, 1)},
        "which keeps the scaling in adapter_config.json",
    ),
}


@pytest.mark.parametrize(("tensors", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_lora_is_refused_in_one_line(
    tensors: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=said) as caught:
        read_lora(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"unet": 3}', "[1]", "{", '"x"'])
def test_a_damaged_header_of_options_is_refused(text: str, tmp_path: Path) -> None:
    save_file(kohya_tensors(), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(AdapterError, match="is damaged"):
        read_lora(tmp_path / "a.safetensors")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"peft_type": "ADALORA"}, "this is a ADALORA one"),
    "bias": ({"bias": "all"}, "trained biases"),
    "experts": ({"target_parameters": ["experts.w"]}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "moves part of the base weight"),
    "alpha": ({"lora_alpha": "many"}, "must be a finite number, not 'many'"),
    "alpha list": ({"alpha_pattern": [1]}, "not a map from layers"),
    "alpha regex": ({"alpha_pattern": {"(": 1}}, "which is not a usable pattern"),
}


@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_changes_the_update_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with_lora("mlp", r=2).save_pretrained(str(tmp_path))
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        read_lora(tmp_path)


def test_a_wrong_layer_lists_the_near_misses(tmp_path: Path) -> None:
    with_lora("mlp", r=2).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="Did you mean .*'lin0'"):
        read_lora(tmp_path).factors("lin")

"""What an adapter survey says, against the updates of the live model that saved it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import SpectralConfig
from spectune.adapter import spectral_modules
from spectune.algebra import dense
from spectune.errors import AdapterError, OptionError
from spectune.surveys import AdapterSurvey, adapter_group_figures, is_adapter, survey_adapter
from spectune.surveys.adapter_survey import LayerSurvey

from ..models import MODELS

PREFIX = "base_model.model."


def adapter(folder: Path, model: str, config: Any) -> Any:
    """A base in folder/base and an adapter with random numbers in folder/adapter; get the live model."""
    tiny = MODELS[model]
    base = tiny.fresh()
    base.save_pretrained(str(folder / "base"))  # type: ignore[operator]
    tuned = get_peft_model(base, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "spectune_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(str(folder / "adapter"))
    return tuned


def check(layer: LayerSurvey, dW_OI: torch.Tensor, W_OI: torch.Tensor, r: int) -> None:
    S_K = torch.linalg.svdvals(dW_OI.double())
    rank = len(layer.values)
    torch.testing.assert_close(torch.tensor(layer.values), S_K[:rank].float(), rtol=1e-4, atol=1e-5)
    assert float(S_K[rank:].sum()) < 1e-4 * float(S_K[0])
    assert layer.relative == pytest.approx(float(dW_OI.norm() / W_OI.norm()), rel=1e-4)
    U_OK, _, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False)
    assert layer.overlap is not None and layer.shape == tuple(W_OI.shape)
    left, right = (U_OK[:, :r].T @ dW_OI).square().sum(), (dW_OI @ Vh_KI[:r].T).square().sum()
    assert layer.overlap.left_top == pytest.approx(float(left / dW_OI.square().sum()), rel=1e-3)
    assert layer.overlap.right_top == pytest.approx(float(right / dW_OI.square().sum()), rel=1e-3)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["spectral_a", "svft", "specadapt"])
def test_a_spectral_adapter_is_seen_as_it_is(model: str, method: str, tmp_path: Path) -> None:
    options = {"r": 3} if method != "svft" else {}
    config = SpectralConfig(method=method, target_modules=list(MODELS[model].targets), **options)
    tuned = adapter(tmp_path, model, config)
    survey = survey_adapter(tmp_path / "adapter", tmp_path / "base", r=5)
    live = {path.removeprefix(PREFIX): module for path, _, module in spectral_modules(tuned)}
    assert {layer.name for layer in survey.layers} == live.keys() and survey.method == method
    assert survey.trainable == sum(p.numel() for module in live.values() for p in module.parameters())
    assert survey.missing == [] and survey.file_bytes > 4 * survey.trainable
    for layer in survey.layers:
        W_OI = tuned.get_submodule(PREFIX + layer.name).original_matrix().detach()
        check(layer, dense(live[layer.name].delta()).detach(), W_OI, 5)


def test_a_lora_on_square_conv1d_weights_is_compared_the_right_way_round(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    tuned = adapter(tmp_path, "gpt2", config)
    survey = survey_adapter(tmp_path / "adapter", tmp_path / "base", r=5)
    assert survey.method == "lora" and len(survey.layers) == 2
    for layer in survey.layers:
        live = tuned.get_submodule(PREFIX + layer.name)
        assert live.base_layer.weight.shape == (32, 32)
        check(layer, live.get_delta_weight("default").T.detach(), live.base_layer.weight.T.detach(), 5)


def test_a_kohya_file_finds_its_base_by_underscored_names(tmp_path: Path) -> None:
    tuned = adapter(tmp_path, "llama", LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        ending = "lora_down" if factor == "A.weight" else "lora_up"
        renamed[f"lora_te_{stem.replace('.', '_')}.{ending}.weight"] = tensor
    save_file(renamed, tmp_path / "kohya.safetensors")
    assert is_adapter(tmp_path / "kohya.safetensors") and not is_adapter(tmp_path / "base")
    survey = survey_adapter(tmp_path / "kohya.safetensors", tmp_path / "base", r=4)
    assert [layer.name for layer in survey.layers] == [f"lora_te_model_layers_{i}_self_attn_q_proj" for i in (0, 1)]
    scale = 8 / 2  # the PEFT default alpha over r; the kohya file names no alpha and so has 1
    for i, layer in enumerate(survey.layers):
        live = tuned.get_submodule(f"{PREFIX}model.layers.{i}.self_attn.q_proj")
        check(layer, live.get_delta_weight("default").detach() / scale, live.base_layer.weight.detach(), 4)


def test_a_lora_without_a_base_says_what_is_missing(tmp_path: Path) -> None:
    adapter(tmp_path, "llama", LoraConfig(r=2, target_modules=["q_proj"]))
    survey = survey_adapter(tmp_path / "adapter")
    assert survey.base is None and "--base" in survey.missing[0]
    assert all(x.relative is None and x.overlap is None and x.intruders is None for x in survey.layers)
    assert all(layer.suggested_r in (1, 2) for layer in survey.layers)
    said = json.loads(json.dumps(survey.to_json(), allow_nan=False))
    assert said["layers"][0]["overlap"] is None and said["rules"]["kept_energy"] == 0.99


def test_the_base_is_the_folder_that_the_config_names(tmp_path: Path) -> None:
    adapter(tmp_path, "llama", SpectralConfig(method="spectral_r", r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="does not name its base model. Pass --base"):
        survey_adapter(tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    survey = survey_adapter(tmp_path / "adapter", quick=True)
    assert survey.base == str(tmp_path / "base") and "--quick" in survey.missing[0]
    assert survey_adapter(tmp_path / "adapter" / "adapter_model.safetensors", quick=True).layers == survey.layers
    assert all(layer.relative is not None and layer.overlap is None for layer in survey.layers)


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, "llama", SpectralConfig(method="spectral_a", r=4, target_modules=["q_proj"]))
    MODELS["llama"].fresh(seed=1).save_pretrained(str(tmp_path / "other"))  # type: ignore[operator]
    with pytest.raises(AdapterError, match="trained on another base"):
        survey_adapter(tmp_path / "adapter", tmp_path / "other")
    adapter(tmp_path / "two", "llama", LoraConfig(r=2, target_modules=["q_proj"]))
    MODELS["bert"].fresh().save_pretrained(str(tmp_path / "bert"))  # type: ignore[operator]
    with pytest.raises(AdapterError, match="no tensor for the layer"):
        survey_adapter(tmp_path / "two" / "adapter", tmp_path / "bert")


def layer(name: str, values: list[float]) -> LayerSurvey:
    return LayerSurvey(name, "q", (8, 8), values, None, None, None)


def survey_of(*layers: LayerSurvey) -> AdapterSurvey:
    return AdapterSurvey("a", "lora", None, 8, 1, 1, len(layers), list(layers), [])


def test_the_suggested_rank_keeps_99_percent_of_the_energy() -> None:
    flat, steep = layer("0", [1.0] * 8), layer("1", [100.0, 1.0, 0.1])
    assert flat.suggested_r == 8 and steep.suggested_r == 1
    # Together the flat layer is 8 of 10,009 parts: one direction each is enough.
    assert survey_of(flat, steep).suggested_r == 1
    # 20 + 8 parts; r = 7 leaves out one of 28, more than 1%.
    assert survey_of(flat, layer("1", [20**0.5])).suggested_r == 8
    assert survey_of(layer("0", [])).suggested_r == 0


def test_kinds_have_medians_and_no_figures_of_what_is_missing() -> None:
    (row,) = adapter_group_figures(survey_of(layer("0", [3.0]), layer("1", [4.0, 3.0])))
    assert row["norm"] == 4.0 and row["count"] == 2 and row["relative"] is None and "intruders" not in row


def test_nan_and_a_useless_r_are_refused(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.full((2, 3), float("nan")), "x.lora_B.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="x: the update contains NaN"):
        survey_adapter(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="--r 0"):
        survey_adapter(tmp_path / "a.safetensors", r=0)

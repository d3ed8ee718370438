"""Wrong input gets one line that names the place, what was asked, what was found, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from spectune import METHODS, SpectralConfig, SpectuneError
from spectune.tuner import SpectralLayer, swap_adapter

from ..models import MODELS, Tiny, output
from .conftest import OPTIONS, adapted, config_for

LLAMA = MODELS["llama"]
WRONG_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "spectral_b"}, "unknown method 'spectral_b'. Did you mean"),
    ({"rank": 4}, r"unexpected keyword argument 'rank'. Did you mean 'r'\?"),
    ({"rank_patern": {}}, "unexpected keyword argument 'rank_patern'. Did you mean 'rank_pattern'"),
    ({"lora_alpha": 16}, "'lora_alpha'. Spectral methods have no alpha: .* set learning_rate"),
    ({"pattern": "banded"}, "'spectral_a' has no option 'pattern'.*has: r, columns"),
    ({"method": "svft", "r": 4}, "'svft' has no option 'r'"),
    (
        {"method": "svft", "pattern": "dense", "core": [3, 4], "rank_pattern": {"q": 4}},
        "rank_pattern does not work with method 'svft' and these options",
    ),
    ({"method": "specadapt", "r": 4, "rank_pattern": {"q": 2}}, "share one 4x4 core"),
    ({"r": 0}, "r must be an integer of at least 1, got 0"),
    ({"method": "spectral_r", "r": 1}, "r must be an integer of at least 2, got 1"),
    ({"method": "specadapt", "weight_dropout": 1.0}, "weight_dropout must be at least 0 and below 1"),
    ({"save_basis": "sometimes"}, "save_basis='sometimes' does not exist"),
    ({"grad_norm": "rsm"}, "grad_norm='rsm' does not exist. Did you mean 'rms'"),
    ({"singular_decay": -0.1}, "singular_decay=-0.1 must not be negative"),
    ({"svd": {"solvr": "exact"}}, "svd has no option 'solvr'. Did you mean 'solver'"),
    ({"bias": "lora_only"}, "bias='lora_only' does not exist"),
    ({"target_modules": ".*q", "layers_to_transform": 0}, "target_modules is a regex"),
    ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"format_version": 99}, "format 99, but this release reads up to"),
]


@pytest.mark.parametrize(("options", "line"), WRONG_CONFIGS, ids=[str(o) for o, _ in WRONG_CONFIGS])
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(SpectuneError, match=line) as caught:
        SpectralConfig(**options)
    assert "\n" not in str(caught.value)


def test_a_wrong_keyword_is_also_a_type_error() -> None:
    with pytest.raises(TypeError):
        SpectralConfig(ranks=4)


def test_a_target_that_matches_nothing_lists_the_near_misses() -> None:
    with pytest.raises(SpectuneError, match=r"no module of .* is called 'q_prj'. Did you mean 'q_proj'"):
        get_peft_model(LLAMA.fresh(), SpectralConfig(target_modules=["q_proj", "q_prj"]))


def test_more_directions_by_pattern_than_the_weight_has_name_the_layer_and_leave_the_model_alone() -> None:
    model = LLAMA.fresh()
    with pytest.raises(SpectuneError, match=r"layers\.0\.self_attn\.k_proj: r=20 is more than this 16x32 weight has"):
        get_peft_model(model, SpectralConfig(rank_pattern={"k_proj": 20}, target_modules=["q_proj", "k_proj"]))
    assert not any(isinstance(module, SpectralLayer) for module in model.modules())
    assert torch.equal(output(model, LLAMA.inputs()), output(LLAMA.fresh(), LLAMA.inputs()))


def test_a_failed_second_adapter_leaves_the_first_as_it_was() -> None:
    model = adapted(LLAMA, "spectral_a")
    tuned = output(model, LLAMA.inputs())
    with pytest.raises(SpectuneError):
        second = SpectralConfig(rank_pattern={"v_proj": 20}, target_modules=["q_proj", "v_proj"])
        model.add_adapter("second", second)
    assert torch.equal(output(model, LLAMA.inputs()), tuned)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused_by_name(bad: float) -> None:
    model = LLAMA.fresh()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = bad
    with pytest.raises(SpectuneError, match=r"layers\.1\.self_attn\.q_proj: .*1 .*(NaN|infinite|finite)"):
        get_peft_model(model, config_for(LLAMA, "spectral_a"))


def test_an_unsupported_layer_is_refused_by_name() -> None:
    with pytest.raises(SpectuneError, match=r"model\.norm: a LlamaRMSNorm is not supported"):
        get_peft_model(LLAMA.fresh(), SpectralConfig(target_modules=["norm"]))


def test_a_base_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(SpectuneError, match="0: the base weight is on the meta device"):
        get_peft_model(model, SpectralConfig(target_modules=["0"], r=2))


SPECTRAL = [name for name in METHODS if name not in ("lidb", "orthogonal_adaptation")]


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("native", [False, True])
def test_an_adapter_of_another_base_is_refused(method: str, native: bool, tmp_path: Path) -> None:
    adapted(LLAMA, method).save_pretrained(tmp_path)
    with pytest.raises(SpectuneError, match=r"q_proj: the adapter was trained on another base weight"):
        if native:
            other = LLAMA.fresh(seed=1)
            other.load_adapter(str(tmp_path))
            output(other, LLAMA.inputs())
        else:
            PeftModel.from_pretrained(LLAMA.fresh(seed=1), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("door", ["peft", "transformers", "swap"])
def test_nan_in_a_file_is_refused_and_a_live_adapter_stays_as_it_is(door: str, value: float, tmp_path: Path) -> None:
    live = adapted(LLAMA, "spectral_a")
    live.save_pretrained(tmp_path)
    before = output(live, LLAMA.inputs())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(".A_U"))
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpectuneError, match="contains NaN or infinity"):
        if door == "peft":
            PeftModel.from_pretrained(LLAMA.fresh(), tmp_path)
        elif door == "transformers":
            other = LLAMA.fresh()
            other.load_adapter(str(tmp_path))  # fills the modules itself; they look at the numbers when first used
            output(other, LLAMA.inputs())
        else:
            swap_adapter(live, tmp_path)
    assert torch.equal(output(live, LLAMA.inputs()), before)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_incomplete_file_is_refused_with_the_missing_tensor(method: str, tmp_path: Path) -> None:
    adapted(LLAMA, method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[-1]
    save_file({name: t for name, t in tensors.items() if name != lost}, path)
    with pytest.raises(SpectuneError, match=rf"the adapter file has no tensor .*{lost.rpartition('.')[2]}"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path)


def test_a_truncated_file_is_refused_with_its_path(tmp_path: Path) -> None:
    adapted(LLAMA, "spectral_a").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpectuneError, match=r"adapter_model\.safetensors"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path)


def test_a_lora_file_under_a_spectral_config_is_refused(tmp_path: Path) -> None:
    get_peft_model(LLAMA.fresh(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"])).save_pretrained(
        tmp_path
    )
    config_for(LLAMA, "spectral_a").save_pretrained(str(tmp_path))
    with pytest.raises(SpectuneError, match="the adapter file has no tensor"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path)


def test_a_file_of_a_newer_format_is_refused_and_not_half_read(tmp_path: Path) -> None:
    adapted(LLAMA, "spectral_a").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "format_version": 2, "twist": 1}))
    with pytest.raises(SpectuneError, match="Upgrade spectune"):
        PeftConfig.from_pretrained(tmp_path)


def test_configs_survive_json(method: str, tmp_path: Path) -> None:
    config = config_for(LLAMA, method, svd={"solver": "exact"}, exclude_modules=["k_proj"])
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SpectralConfig) and loaded.to_dict() == config.to_dict()
    assert loaded.build_method() == config.build_method()


def test_method_defaults_stand_in_the_config() -> None:
    config = SpectralConfig()
    assert (config.method, config.r, config.columns, config.pattern) == ("spectral_a", 8, "top", None)


def test_every_field_has_help_and_a_default() -> None:
    from dataclasses import MISSING, fields

    for f in fields(SpectralConfig):
        assert f.metadata.get("help") or f.name in {
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        }, f.name
        assert f.default is not MISSING or f.default_factory is not MISSING, f.name


def test_every_option_of_every_method_is_a_config_field() -> None:
    from dataclasses import fields

    known = {f.name for f in fields(SpectralConfig)}
    for name, kind in METHODS.items():
        assert set(kind.options()) <= known, name
    assert set(OPTIONS) == set(METHODS)


def test_merging_a_broken_adapter_safely_leaves_the_base(tiny: Tiny) -> None:
    model = adapted(tiny, "spectral_a")
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    before = {n: m.base_layer.weight.clone() for n, m in model.named_modules() if isinstance(m, SpectralLayer)}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            assert torch.equal(module.base_layer.weight, before[name])


@pytest.mark.parametrize("name", ["0", "mlp", "layers", "q_proj", "spectune_adapter"])
def test_an_adapter_that_is_called_like_a_part_of_a_path_is_refused(name: str) -> None:
    model = LLAMA.fresh()
    before = [path for path, _ in model.named_modules()]
    with pytest.raises(SpectuneError, match=f"adapter_name='{name}'.*Choose another name"):
        get_peft_model(model, config_for(LLAMA, "spectral_a"), adapter_name=name)
    assert [path for path, _ in model.named_modules()] == before
    with pytest.raises(SpectuneError, match="adapter_name"):
        adapted(LLAMA, "spectral_a").add_adapter(name, config_for(LLAMA, "svft"))


def test_names_that_peft_has_put_into_the_model_are_free() -> None:
    model = get_peft_model(LLAMA.fresh(), LoraConfig(r=2, target_modules=list(LLAMA.targets)), adapter_name="x")
    assert get_peft_model(model.unload(), config_for(LLAMA, "spectral_a"), adapter_name="x")
    two = adapted(LLAMA, "spectral_a", modules_to_save=["lm_head"])
    two.add_adapter("lora_A", config_for(LLAMA, "svft"))


def test_tensors_of_layers_that_the_config_no_longer_names_are_refused(tmp_path: Path) -> None:
    adapted(LLAMA, "spectral_a").save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])[:1]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SpectuneError, match="the adapter file has this tensor, but the model has no adapted layer"):
        PeftModel.from_pretrained(LLAMA.fresh(), str(tmp_path))

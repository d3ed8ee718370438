"""Weights that accelerate keeps elsewhere between forwards: every layer answers as it does with them at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.errors import OptionError, WeightError

from ..experts import fresh
from ..models import MODELS, output
from .conftest import adapted
from .test_kinds import LAYERS
from .test_kinds import adapted as adapted_kind
from .test_kinds import output as output_of

HERE = torch.device("cpu")


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("save_basis", ["auto", "always"])
@pytest.mark.parametrize("method", list(METHODS))
def test_an_offloaded_model_answers_the_same(method: str, save_basis: str, offload_buffers: bool) -> None:
    model = adapted(MODELS["llama"], method, save_basis=save_basis)
    expected = output(model, MODELS["llama"].inputs())
    cpu_offload(model, execution_device=HERE, offload_buffers=offload_buffers)
    for _ in range(2):  # the second forward fetches everything again
        found = output(model, MODELS["llama"].inputs())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_every_kind_of_layer_may_be_offloaded(kind: str) -> None:
    model, x, expected = adapted_kind(kind, "specadapt")
    expected = output_of(model, x)
    # torch's attention never calls its out_proj, so accelerate has to be told to fetch it with the attention.
    cpu_offload(model, execution_device=HERE, preload_module_classes=["MultiheadAttention"])
    torch.testing.assert_close(output_of(model, x), expected, rtol=1e-4, atol=1e-5)
    assert any(parameter.is_meta for parameter in model.parameters())


def test_a_model_offloaded_to_disk_answers_the_same(tmp_path: Any) -> None:
    model = adapted(MODELS["llama"], "specadapt")
    expected = output(model, MODELS["llama"].inputs())
    disk_offload(model, tmp_path, execution_device=HERE)
    torch.testing.assert_close(output(model, MODELS["llama"].inputs()), expected, rtol=1e-4, atol=1e-5)


def spread(folder: Path, kind: str = "llama") -> Any:
    """Load a model as device_map does where memory is short: one layer here, one on the disk."""
    if not (folder / "base").exists():
        (MODELS["llama"].fresh() if kind == "llama" else fresh(kind)).save_pretrained(folder / "base")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", device_map=places, offload_folder=folder / "off")
    assert loaded.model.layers[1].self_attn.q_proj.weight.is_meta
    return loaded.eval()


def test_a_base_that_is_partly_on_the_disk_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(MODELS["llama"], "svft").save_pretrained(tmp_path / "adapter")
    base, inputs = spread(tmp_path), MODELS["llama"].inputs()
    expected = output(base, inputs)
    config = SpectralConfig(method="svft", target_modules="all-linear")
    monkeypatch.setattr("spectune.tuner.bases.obtain", None)  # nothing is decomposed
    attaching: tuple[Callable[[Any], Any], ...] = (
        lambda model: get_peft_model(model, config),
        lambda model: PeftModel.from_pretrained(model, tmp_path / "adapter"),
        lambda model: model.load_adapter(str(tmp_path / "adapter")),
    )
    for attach in attaching:
        with pytest.raises(WeightError, match=r"layers\.1\.\S+: the base weight is offloaded") as refused:
            attach(spread(tmp_path))
        assert "dispatch_model" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(WeightError):
        get_peft_model(base, config)
    torch.testing.assert_close(output(base, inputs), expected, rtol=0, atol=0)
    experts = SpectralConfig(target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(WeightError, match=r"layers\.1\.\S+down_proj: the base weight is offloaded"):
        get_peft_model(spread(tmp_path / "moe", "mixtral"), experts)


def test_an_adapted_model_is_spread_as_a_device_map_would(tmp_path: Path) -> None:
    model = adapted(MODELS["llama"], "svft")
    expected = output(model, MODELS["llama"].inputs())
    stem = "base_model.model."
    places = {f"{stem}{name}": "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    places |= {f"{stem}model.layers.0": "cpu", f"{stem}model.layers.1": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.is_meta
    torch.testing.assert_close(output(model, MODELS["llama"].inputs()), expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_in_one_batch_may_be_offloaded() -> None:
    model = adapted(MODELS["llama"], "spectral_r")
    inputs = {**MODELS["llama"].inputs(), "adapter_names": ["default", "__base__", "default"]}
    expected = output(model, inputs)
    cpu_offload(model, execution_device=HERE)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_offloaded_adapter_is_as_it_was_when_it_comes_back() -> None:
    model = adapted(MODELS["llama"], "specadapt")
    before = {name: module.delta().core.clone() for name, _, module in spectral_modules(model)}
    cpu_offload(model, execution_device=HERE)
    output(model, MODELS["llama"].inputs())
    remove_hook_from_submodules(model)
    for name, _, module in spectral_modules(model):
        assert torch.equal(module.delta().core, before[name])


def test_the_shared_core_refuses_a_rank_of_its_own_for_a_layer() -> None:
    with pytest.raises(OptionError, match="share one 8x8 core") as refused:
        SpectralConfig(method="specadapt", rank_pattern={"q_proj": 2})
    assert "\n" not in str(refused.value)
    config = SpectralConfig(
        method="specadapt", shared_core=False, r=3, rank_pattern={"lin1": 2}, target_modules="all-linear"
    )
    model: PeftModel = get_peft_model(nn.Sequential(MODELS["mlp"].fresh()), config)
    ranks = [len(module.trained["H"]) for _, _, module in spectral_modules(model)]
    assert sorted(ranks) == [2, 3]

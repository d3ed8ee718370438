"""Weights that accelerate keeps elsewhere between forwards: every layer answers as it does with them at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.errors import OptionError

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

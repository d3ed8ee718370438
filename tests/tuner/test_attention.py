"""torch's nn.MultiheadAttention keeps PEFT's contract, though torch never calls the layer inside of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules

from .conftest import OPTIONS, train
from .test_kinds import build, output


def attention(method: str = "spectral_a", **more: Any) -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    """Get a trained adapter on an attention, its input, and what the base alone answers."""
    base, x = build("attention")
    before = output(base, x)
    model = get_peft_model(
        base, SpectralConfig(**{"method": method, "target_modules": ["attention"], **OPTIONS[method], **more})
    )
    train(model)
    return model.eval(), x, before


def parts(model: PeftModel) -> tuple[Any, Any]:
    adapted = model.base_model.model.attention
    return adapted, adapted.get_base_layer().out_proj


@pytest.mark.parametrize("method", list(METHODS))
def test_merge_and_unload_leaves_a_plain_attention_with_both_updates(method: str) -> None:
    model, x, before = attention(method)
    tuned = output(model, x)
    merged = model.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention
    assert type(merged.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    torch.testing.assert_close(output(merged, x), tuned, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output(merged, x), before, atol=1e-4)


def test_unload_gives_the_attention_back_bit_for_bit() -> None:
    model, x, before = attention()
    bare = model.unload()
    assert type(bare.attention) is nn.MultiheadAttention
    assert sorted(bare.state_dict()) == sorted(build("attention")[0].state_dict())
    assert torch.equal(output(bare, x), before)


def test_disabling_a_merged_adapter_unmerges_both_weights() -> None:
    model, x, before = attention()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, x), before)
    assert not any(layer.merged for layer in parts(model))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_restore_weights_makes_parameters_of_plain_tensors(requires_grad: bool) -> None:
    model, x, _ = attention()
    tuned = output(model, x)
    adapted, out_proj = parts(model)
    for layer, name in ((adapted.base_layer, "in_proj_weight"), (out_proj.base_layer, "weight")):
        weight = getattr(layer, name).detach().clone().requires_grad_(requires_grad)
        delattr(layer, name)
        setattr(layer, name, weight)
    assert torch.equal(output(model, x), tuned)
    adapted._restore_weights()
    for weight in (adapted.base_layer.in_proj_weight, out_proj.base_layer.weight):
        assert isinstance(weight, nn.Parameter) and weight.requires_grad == requires_grad
    assert torch.equal(output(model, x), tuned)


def test_a_tensor_that_stands_before_a_parameter_is_what_the_update_is_added_to() -> None:
    """FSDP1 leaves the sharded parameter in its place and sets the whole tensor as an attribute before it."""
    model, x, _ = attention()
    tuned = output(model, x)
    adapted, out_proj = parts(model)
    for layer, name in ((adapted.base_layer, "in_proj_weight"), (out_proj.base_layer, "weight")):
        whole = getattr(layer, name).detach().clone()
        layer._parameters[name] = nn.Parameter(torch.zeros(0))
        object.__setattr__(layer, name, whole)
    assert torch.equal(output(model, x), tuned)
    assert adapted.base_layer.in_proj_weight.shape == (48, 16)


def test_rows_with_different_adapters_are_refused_as_a_wrong_keyword() -> None:
    model, x, _ = attention()
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model(x, adapter_names=["default"] * len(x))


def test_both_weights_share_one_core() -> None:
    model, _, _ = attention("specadapt", shared_core=True)
    assert [name for name, _ in model.named_parameters() if name.endswith(".H")] == [
        "base_model.model.attention.spectune_adapter.default.H"
    ]
    first, second = (module for _, _, module in spectral_modules(model))
    assert first.trained["H"] is second.trained["H"]


@pytest.mark.parametrize("grad", [False, True])
def test_an_encoder_layer_of_torch_uses_the_tuned_attention(grad: bool) -> None:
    """In eval mode without gradients torch has a fast path that reads the weights past the layer."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    before = output(base, x)
    model = get_peft_model(base, SpectralConfig(r=3, target_modules=["self_attn"])).eval()
    train(model)
    with torch.set_grad_enabled(grad):
        tuned = model(x)
    assert not torch.allclose(tuned, before, atol=1e-4)
    torch.testing.assert_close(output(model.merge_and_unload(), x), tuned.detach(), rtol=1e-4, atol=1e-5)

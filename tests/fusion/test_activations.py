"""What an adapter's examples send into its layers."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectune import collect_grams
from spectune.errors import OptionError

from ..models import MODELS
from .parts import lora, spectral


def test_grams_are_those_of_the_layers_inputs_summed_over_batches() -> None:
    model = MODELS["mlp"].fresh()
    x_NI = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    grams = collect_grams(model, [x_NI[:3], {"x": x_NI[3:]}], layers=["lin0", "lin1"])
    hidden_NI = torch.relu(model.lin0(x_NI)).detach()
    torch.testing.assert_close(grams["lin0"], x_NI.double().T @ x_NI.double())
    torch.testing.assert_close(grams["lin1"], hidden_NI.double().T @ hidden_NI.double(), rtol=1e-5, atol=1e-5)
    assert collect_grams(model, [x_NI], layers=["lin0"], dtype=torch.float32)["lin0"].dtype == torch.float32


@pytest.mark.parametrize("config", [spectral("top"), lora(2)])
def test_the_layers_are_those_that_the_adapter_adapts(config: object) -> None:
    model = get_peft_model(MODELS["llama"].fresh(), config).train()
    grams = collect_grams(model, [MODELS["llama"].inputs()])
    assert sorted(grams) == [
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert grams["model.layers.0.mlp.down_proj"].shape == (48, 48) and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_adapter_itself_is_on() -> None:
    model = get_peft_model(MODELS["llama"].fresh(), spectral("top", init_weights=False))
    inputs, name = MODELS["llama"].inputs(), "model.layers.1.self_attn.q_proj"
    on = collect_grams(model, [inputs])[name]
    with model.disable_adapter():
        assert not torch.allclose(collect_grams(model, [inputs])[name], on, rtol=1e-2)


def test_padding_is_left_out() -> None:
    model = get_peft_model(MODELS["bert"].fresh(), spectral("top", target_modules=["query"], task_type="SEQ_CLS"))
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = collect_grams(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = collect_grams(model, [{"input_ids": ids[:1, :3]}, {"input_ids": ids[1:]}])
    for name, gram_II in alone.items():
        torch.testing.assert_close(padded[name], gram_II, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(3, 5, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2), bias=False), (2, 3, 8, 9)),
        (nn.Conv2d(3, 5, 3, bias=False), (3, 8, 9)),
        (nn.Conv1d(3, 5, 4, padding=2, stride=3, dilation=2, bias=False), (2, 3, 19)),
    ],
    ids=["2d", "unbatched", "1d"],
)
def test_inputs_of_a_convolution_are_its_patches(convolution: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gram_II = collect_grams(nn.Sequential(convolution), [x], layers=["0"])["0"]
    weight_OI = convolution.weight.detach().flatten(1).double()
    # |W X|^2 = tr(W X X^T W^T)
    torch.testing.assert_close(
        (weight_OI @ gram_II @ weight_OI.T).trace(), (convolution(x).detach().double() ** 2).sum(), rtol=1e-5, atol=0
    )


def test_what_cannot_be_collected_is_refused() -> None:
    model = MODELS["mlp"].fresh()
    with pytest.raises(OptionError, match="MLP: the model has no adapter"):
        collect_grams(model, [torch.ones(2, 10)])
    with pytest.raises(OptionError, match=r"'lin2' is not a layer of MLP. Did you mean"):
        collect_grams(model, [torch.ones(2, 10)], layers=["lin2"])
    with pytest.raises(OptionError, match="lin0: no batch went through this layer"):
        collect_grams(model, [], layers=["lin0"])
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(
        OptionError, match="0: gradient fusion can only read the inputs of linear layers .* this is a Conv2d"
    ):
        collect_grams(conv, [torch.ones(1, 4, 8, 8)], layers=["0"])
    assert not model.lin0._forward_pre_hooks and not conv[0]._forward_pre_hooks

"""Every kind of layer: convolutions, embeddings, attention, quantised linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig, SpectuneError
from spectune.adapter import spectral_modules

from .conftest import OPTIONS, train


class Wrapped(nn.Module):
    """One layer called `layer`, with a nonlinearity behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.attention(x, x, x, need_weights=False)
        return output


# name -> (layer, input). The kernels' flattened matrices are 12 x 45 and alike.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "conv1d": (lambda: Wrapped(nn.Conv1d(6, 12, 3, padding=1)), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: Wrapped(nn.Conv2d(5, 12, 3, stride=2)), lambda: torch.randn(2, 5, 8, 8)),
    "conv2d-unbatched": (lambda: Wrapped(nn.Conv2d(5, 12, 3)), lambda: torch.randn(5, 8, 8)),
    "conv2d-circular": (
        lambda: Wrapped(nn.Conv2d(5, 12, 3, padding=1, padding_mode="circular")),
        lambda: torch.randn(2, 5, 6, 6),
    ),
    "conv2d-groups": (
        lambda: Wrapped(nn.Conv2d(8, 12, 3, groups=2, dilation=2)),
        lambda: torch.randn(2, 8, 9, 9),
    ),
    "conv3d": (lambda: Wrapped(nn.Conv3d(4, 10, 2)), lambda: torch.randn(2, 4, 4, 4, 4)),
    "embedding": (lambda: Wrapped(nn.Embedding(20, 12)), lambda: torch.randint(0, 20, (3, 5))),
    "attention": (lambda: SelfAttention(False), lambda: torch.randn(5, 3, 16)),
    "attention-batch-first": (lambda: SelfAttention(True), lambda: torch.randn(3, 5, 16)),
}


@pytest.fixture(params=list(LAYERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]
    return layer().eval(), x()


def config_for(kind: str, method: str, **more: Any) -> SpectralConfig:
    target = "attention" if kind.startswith("attention") else "layer"
    return SpectralConfig(method=method, target_modules=[target], **{**OPTIONS[method], **more})


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # Without a graph throughout: torch's attention takes another road, with other roundoff, when gradients flow.
    with torch.no_grad():
        return model(x)


def adapted(kind: str, method: str) -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    model, x = build(kind)
    base = output(model, x)
    peft_model = get_peft_model(model, config_for(kind, method)).eval()
    assert torch.equal(output(peft_model, x), base), "the untrained adapter changes the output"
    train(peft_model, 0.2)
    return peft_model, x, base


def test_forward_is_the_layer_with_the_updated_weight(kind: str, method: str) -> None:
    model, x, base = adapted(kind, method)
    tuned = output(model, x)
    assert (tuned - base).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(output(model, x), tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, x), tuned)
    with model.disable_adapter():
        assert torch.equal(output(model, x), base)


def test_a_saved_adapter_loads_to_the_same_output(kind: str, method: str, tmp_path: Path) -> None:
    model, x, _ = adapted(kind, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind)[0], tmp_path).eval()
    torch.testing.assert_close(output(loaded, x), output(model, x), rtol=0, atol=1e-6)


def test_gradients_reach_every_adapter(kind: str, method: str) -> None:
    model, x, _ = adapted(kind, method)
    model.train()(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".spectune_adapter." in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.count_nonzero(parameter.grad), name


def test_merging_a_grouped_convolution_changes_no_bit(method: str) -> None:
    model, x, _ = adapted("conv2d-groups", method)
    tuned = output(model, x)
    model.merge_adapter()
    assert torch.equal(output(model, x), tuned)


def test_kernels_are_flattened_as_in_the_papers() -> None:
    model, _ = build("conv2d")
    kernel = model.layer.weight.detach()
    module = next(spectral_modules(get_peft_model(model, config_for("conv2d", "svdiff"))))[2]
    torch.testing.assert_close(module.S_R, torch.linalg.svdvals(kernel.reshape(12, 45)), rtol=1e-4, atol=1e-5)


def test_attention_output_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(SpectuneError, match=r"attention\.out_proj: torch's MultiheadAttention reads the weight"):
        get_peft_model(SelfAttention(True), SpectralConfig(target_modules=["out_proj"], r=2))


def test_attention_of_separate_sizes_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, kdim=8, vdim=8)})
    with pytest.raises(SpectuneError, match="separate q, k, v sizes"):
        get_peft_model(model, SpectralConfig(target_modules=["attention"], r=2))


def quantised(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    if kind == "torchao-int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig(version=2))
        return model
    bnb = pytest.importorskip("bitsandbytes")
    source = model[0]
    if kind == "bnb-4bit":
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    model[0] = layer.to("cpu")
    return model


@pytest.mark.parametrize("quantisation", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
def test_quantised_bases_stay_quantised_and_train(quantisation: str, method: str) -> None:
    model, x = quantised(quantisation), torch.randn(5, 64)
    base = model(x).detach()
    stored = type(model[0].weight)
    peft_model = get_peft_model(model, SpectralConfig(method=method, target_modules=["0"], **OPTIONS[method]))
    torch.testing.assert_close(peft_model(x), base, rtol=0, atol=0)
    peft_model.train()(x).square().mean().backward()
    train(peft_model, 0.2)
    assert (peft_model(x) - base).abs().max() > 1e-3
    assert type(model[0].base_layer.weight) is stored
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(x), base)


@pytest.mark.parametrize("quantisation", ["bnb-4bit", "torchao-int8"])
def test_merging_into_a_quantised_base_is_refused(quantisation: str) -> None:
    model = get_peft_model(quantised(quantisation), SpectralConfig(target_modules=["0"], r=2))
    with pytest.raises(SpectuneError, match="0: the base weight is quantised; merging would round the update away"):
        model.merge_adapter()


@pytest.mark.parametrize("quantisation", ["bnb-4bit", "torchao-int8"])
def test_an_adapter_of_a_quantised_base_comes_back(quantisation: str, tmp_path: Path) -> None:
    x = torch.randn(5, 64)
    model = get_peft_model(quantised(quantisation), SpectralConfig(target_modules=["0"], r=4))
    train(model, 0.2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(quantisation), tmp_path)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=1e-5)

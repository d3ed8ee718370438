"""Layers whose weight the model reads, and layers that compute more than W x + b: live, merged and trained agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import SpectralConfig, SpectuneError, export_lora
from spectune.adapter import spectral_modules
from spectune.tuner import own_code

from ..models import INIT, ids
from .conftest import train

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "initializer_range": INIT}
TOKENS = {"input_ids": ids()}


class HandTied(nn.Module):
    """A head that is the embedding, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embedding = nn.Linear(16, 16), nn.Embedding(64, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(self.embedding(input_ids)), self.embedding.weight)


class Deep(nn.Module):
    """A model that reads the weight of a layer of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = HandTied()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.block(input_ids) @ self.block.embedding.weight @ self.block.body.weight


class Standardised(nn.Conv2d):
    """A convolution that standardises its kernels, as in BiT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.flatten(1).std(1)[:, None, None, None], self.bias)


class Scaled(nn.Linear):
    """A linear layer that is not a plain product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight))


class Router(nn.Linear):
    """Scores and the choice, as Llama 4's router."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.router = nn.Linear(16, 16), Router(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(self.body(x))
        return scores + chosen[..., None]


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 1)


def jamba() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    mamba = {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
    }
    return tf.JambaForCausalLM(tf.JambaConfig(**{**SIZES, "num_hidden_layers": 2}, **heads, **mamba, num_experts=2))


X = {"x": torch.randn(3, 16, generator=torch.Generator().manual_seed(1))}
IMAGE = {"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))}
SEQUENCE = {"src": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}
OPT = {"ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 16, "word_embed_proj_dim": 32}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "mamba": (lambda: tf.MambaForCausalLM(tf.MambaConfig(**SIZES, state_size=4)), "all-linear", TOKENS),
    "falcon_mamba": (
        lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**SIZES, state_size=4)),
        r".*\.(in_proj|dt_proj)",
        TOKENS,
    ),
    "jamba": (jamba, ["conv1d", "dt_proj", "x_proj", "out_proj"], TOKENS),
    "encoder": (encoder, ["linear1", "linear2"], SEQUENCE),
    "hand-tied": (HandTied, ["embedding"], TOKENS),
    "deep": (Deep, ["embedding", "body"], TOKENS),
    "conv": (lambda: nn.Sequential(Standardised(3, 6, 3)), ["0"], {"input": IMAGE["x"]}),
    "scaled": (lambda: nn.Sequential(Scaled(16, 16)), ["0"], {"input": X["x"]}),
    "positions": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**{k: v for k, v in SIZES.items() if k != "initializer_range"}, **OPT)),
        ["embed_positions"],
        TOKENS,
    ),
}


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval().requires_grad_(False)


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.filterwarnings("ignore:.* was lowered")
@pytest.mark.filterwarnings("ignore:left out of the adapter.*PEFT refuses a LoRA on out_proj")
@pytest.mark.parametrize("case", list(CASES))
def test_live_merged_and_trained_agree(case: str, tmp_path: Path) -> None:
    build, targets, inputs = CASES[case]
    with torch.no_grad():
        base = logits(fresh(build), inputs)
    model = get_peft_model(fresh(build), SpectralConfig(r=3, target_modules=targets))
    train(model, scale=0.05)
    model.train()
    logits(model, inputs).square().sum().backward()
    for layer, _, module in spectral_modules(model):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), layer
    model.eval()
    with torch.no_grad():
        live = logits(model, inputs)
        assert (live - base).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), base)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(build), tmp_path).eval()
        torch.testing.assert_close(logits(again, inputs), live, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), live, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), base)
        model.unmerge_adapter()
        assert torch.equal(logits(model, inputs), live)


@pytest.mark.parametrize("targets", ["all-linear", ["body", "router"], r"body|router"])
def test_a_layer_that_returns_a_tuple_is_passed_over_in_one_line(targets: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"left out of the adapter: router \(a Router returns more than one") as said:
        model = get_peft_model(fresh(Routed), SpectralConfig(r=2, target_modules=targets))
    assert len(said) == 1
    train(model)
    with torch.no_grad():
        live = logits(model.eval(), X)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(Routed), tmp_path)
        assert torch.equal(logits(again.eval(), X), live)
        torch.testing.assert_close(logits(model.merge_and_unload(), X), live, rtol=0, atol=1e-5)


def test_a_model_of_such_layers_alone_is_refused() -> None:
    with pytest.raises(SpectuneError, match="router: a Router returns tuple and not one tensor"):
        get_peft_model(fresh(Routed), SpectralConfig(r=2, target_modules=["router"]))


def test_what_a_lora_cannot_do_is_not_exported(tmp_path: Path) -> None:
    cases = {"mamba": ["dt_proj"], "scaled": ["0"]}
    reasons = {"mamba": "reads this layer's weight", "scaled": "a Scaled does"}
    for case, targets in cases.items():
        model = get_peft_model(fresh(CASES[case][0]), SpectralConfig(r=2, target_modules=targets))
        with pytest.raises(SpectuneError, match=reasons[case]):
            export_lora(model, tmp_path / case.replace(" ", "_"))
        assert not (tmp_path / case.replace(" ", "_")).exists()
    model = get_peft_model(fresh(CASES["mamba"][0]), SpectralConfig(r=2, target_modules=["in_proj", "x_proj"]))
    assert export_lora(model, tmp_path / "fine").ranks


def test_rows_cannot_differ_in_a_weight_that_is_read() -> None:
    model = get_peft_model(fresh(HandTied), SpectralConfig(r=2, target_modules=["embedding"])).eval()
    with pytest.raises(SpectuneError, match=r"embedding: the model reads this layer's weight.*the same adapter"):
        model(**TOKENS, adapter_names=["default", "__base__", "default"])
    own = get_peft_model(fresh(lambda: nn.Sequential(Scaled(16, 16))), SpectralConfig(r=2, target_modules=["0"])).eval()
    with pytest.raises(SpectuneError, match="0: a Scaled runs on one weight"):
        own(X["x"], adapter_names=["default"] * 3)


def test_a_weight_that_is_asked_for_its_dtype_is_the_stored_one() -> None:
    """T5 asks its `wo` so in each forward: an update that is built for that would cost a step its time."""
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
    )
    model = get_peft_model(t5, SpectralConfig(r=2, target_modules=["wo"]))
    for layer, _, _ in spectral_modules(model):
        adapted: Any = model.get_submodule(layer)
        assert adapted.weight is adapted.get_base_layer().weight


def reads_elsewhere(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.body.weight)


@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_that_one_model_got_for_itself_is_read_too(bound: bool) -> None:
    model, other = HandTied(), HandTied()
    forward: Any = reads_elsewhere.__get__(model) if bound else reads_elsewhere
    model.forward = forward  # type: ignore[method-assign]
    assert own_code.is_read(model, "body") == (True, False)  # the class calls it
    assert own_code.is_read(other, "body") == (False, False)


def test_the_code_of_a_class_is_searched_once_however_many_layers_a_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    uses = own_code._uses
    monkeypatch.setattr(own_code, "_uses", lambda code, *asked: searched.append(code) or uses(code, *asked))
    own_code._uses_by_class.cache_clear()
    for layers in (1, 5):
        sizes = {**SIZES, "num_hidden_layers": layers, "intermediate_size": 48, "num_attention_heads": 4}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2))
        get_peft_model(model, SpectralConfig(r=2, target_modules=["q_proj", "down_proj"]))
        if layers == 1:
            first = len(searched)
    assert len(searched) == first > 0

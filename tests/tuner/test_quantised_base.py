"""Quantised models: bases found on the full-precision files, and weights that bitsandbytes packs for a CPU."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from spectune import SpectralConfig, export_lora, merge_checkpoint, prepare
from spectune.adapter import spectral_modules

from .conftest import train

TARGETS = ["q_proj", "up_proj"]
TOKENS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantised(base: Path, kind: str) -> Any:
    if kind == "fp8":
        torchao = pytest.importorskip("torchao.quantization")
        how: Any = TorchAoConfig(torchao.Float8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        four |= {"bnb_4bit_compute_dtype": torch.float32}
        how = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=how)


def config(**options: Any) -> SpectralConfig:
    return SpectralConfig(**{"method": "spectral_r", "r": 4, "target_modules": TARGETS} | options)


def left_vectors(model: Any) -> list[torch.Tensor]:
    return [module.U_OR.clone() for _, _, module in spectral_modules(model)]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_an_adapter_of_a_quantised_model_fits_the_full_one(base: Path, tmp_path: Path, kind: str) -> None:
    model = get_peft_model(quantised(base, kind), config())
    full = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config())
    assert ("quantization_backend='" in repr(model), "quantization_backend" in repr(full)) == (True, False)
    for ours, theirs in zip(left_vectors(model), left_vectors(full), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    train(model, 0.05)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(base, kind), str(tmp_path / "adapter"))
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    torch.testing.assert_close(lora(TOKENS).logits, live(TOKENS).logits, rtol=0, atol=1e-4)
    merged = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged").path
    whole = AutoModelForCausalLM.from_pretrained(merged)(TOKENS).logits
    torch.testing.assert_close(whole, live(TOKENS).logits, rtol=0, atol=1e-4)


def test_a_second_adapter_uses_the_full_weights_too(base: Path) -> None:
    model = get_peft_model(quantised(base, "nf4"), config())
    model.add_adapter("other", config(r=6))
    bases = {name: module.U_OR for path, name, module in spectral_modules(model) if path.endswith("1.mlp.up_proj")}
    torch.testing.assert_close(bases["other"][:, :4].abs(), bases["default"].abs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["moved", "other"])
def test_without_its_files_the_dequantised_weight_serves_with_a_warning(base: Path, what: str) -> None:
    model = quantised(base, "nf4")
    shutil.rmtree(base)
    if what == "other":
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**model.config.to_diff_dict() | {"quantization_config": None})).save_pretrained(
            base
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config())
    (warned,) = [w for w in said if "4 of 4 quantised weights are not at hand in full precision" in str(w.message)]
    assert warned.filename == __file__
    _, _, module = next(iter(spectral_modules(adapted)))
    dequantised = adapted.base_model.model.model.layers[0].self_attn.q_proj.original_matrix()
    S_R = torch.linalg.svdvals(dequantised)[:4]
    torch.testing.assert_close(module.S_R, S_R, rtol=1e-4, atol=0)


def test_adapters_attach_right_after_an_inference(base: Path) -> None:
    fresh = get_peft_model(quantised(base, "nf4"), config(svd={"cache_dir": "off"}))
    used = quantised(base, "nf4").eval()
    with torch.no_grad():
        used(TOKENS)  # bitsandbytes packs the weights here
    shutil.rmtree(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(used, config(svd={"cache_dir": "off"}))
    for (_, _, one), (_, _, other) in zip(spectral_modules(fresh), spectral_modules(adapted), strict=True):
        # Unpacked, the scales of the blocks are bfloat16.
        torch.testing.assert_close(one.base_matrix(), other.base_matrix(), rtol=2**-7, atol=0)


def test_gradients_are_the_same_before_and_after_an_evaluation(base: Path) -> None:
    model = get_peft_model(quantised(base, "nf4"), config())

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(TOKENS)
    torch.testing.assert_close(gradients(), before, rtol=0, atol=1e-6)


def test_directions_of_data_are_the_same_after_an_inference(base: Path) -> None:
    def directions(used: bool) -> Any:
        model = quantised(base, "nf4").eval()
        if used:
            with torch.no_grad():
                model(TOKENS)
        given = config(method="svft", pattern="dense", r=None, basis_rank=5, directions="gradient")
        return prepare(model, given, [{"input_ids": TOKENS, "labels": TOKENS}]).spectra

    fresh, used = directions(False), directions(True)
    for layer, found in fresh.items():
        cosines_R = torch.linalg.svdvals(found.U_OR.mT @ used[layer].U_OR)
        assert float(cosines_R.min()) > 0.99  # the scales of an unpacked weight are bfloat16


def test_places_are_chosen_in_the_directions_that_the_adapter_gets(base: Path) -> None:
    given = config(method="svft", pattern="chosen", r=None, basis_rank=5, places=6)
    found = prepare(quantised(base, "nf4"), given, [{"input_ids": TOKENS, "labels": TOKENS}])
    assert found.spectra is not None
    for layer, _, module in spectral_modules(get_peft_model(quantised(base, "nf4"), found)):
        ranked = found.spectra[layer.removeprefix("base_model.model.")]
        torch.testing.assert_close(module.U_OR, ranked.U_OR, rtol=0, atol=0)
        assert (module.frozen["rows"] * 5 + module.frozen["cols"]).tolist() == sorted(ranked.places[:6].tolist())

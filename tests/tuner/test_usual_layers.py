"""Without target_modules: PEFT's table, or else the attention, found by the model's structure and said in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import SpectralConfig
from spectune.adapter import spectral_modules
from spectune.errors import OptionError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LM = {**SIZES, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4}
WHISPER = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4}
EXPERTS = {**LM, "num_local_experts": 2, "num_experts_per_tok": 1}
VISION = {"embed_dim": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def clip() -> nn.Module:
    parts = {"text_config": {**SIZES, "vocab_size": 32, **IDS}, "vision_config": {**SIZES, **IMAGE}}
    return tf.CLIPModel(tf.CLIPConfig(projection_dim=8, **parts))


def qwen() -> nn.Module:
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config={**LM, **ROPE}, vision_config=VISION))


Q_TO_O = {"q_proj", "k_proj", "v_proj", "o_proj"}
Q_TO_OUT = {"q_proj", "k_proj", "v_proj", "out_proj"}
CASES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LM, eos_token_id=2)), {"qkv_proj", "o_proj"}),
    "whisper": (lambda: tf.WhisperModel(tf.WhisperConfig(**WHISPER, **HEADS, **IDS)), Q_TO_OUT),
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**SIZES, **IMAGE)), set()),
    "clip": (clip, Q_TO_OUT),
    "modernbert": (lambda: tf.ModernBertModel(tf.ModernBertConfig(**SIZES, vocab_size=32, **IDS)), {"Wqkv", "Wo"}),
    "qwen2_vl": (qwen, Q_TO_O | {"qkv", "proj"}),
    "gpt_oss": (lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**EXPERTS, head_dim=8)), Q_TO_O),
}
IN_THE_TABLE: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM)),
}


def tuned(build: Callable[[], Any], **options: Any) -> tuple[Any, list[str]]:
    """Get the adapted model and what was said about its targets."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(build(), SpectralConfig(r=1, **options))
    return model, [str(one.message) for one in said if "target_modules" in str(one.message)]


@pytest.mark.parametrize("kind", list(CASES))
def test_the_attention_is_tuned_and_one_line_says_so(kind: str, tmp_path: Any) -> None:
    build, leaves = CASES[kind]
    model, said = tuned(build)
    paths = [path for path, _, _ in spectral_modules(model)]
    assert paths and all(re.search("attn|attention", path) for path in paths)
    found = {path.rpartition(".")[2] for path in paths}
    assert found == leaves or (not leaves and len(found) == 4)  # transformers renamed those of ViT
    assert said == [
        f"target_modules: PEFT's table has no usual layers for {kind}, so the {len(paths)} projections of its "
        f"attention are tuned: {', '.join(sorted(model.peft_config['default'].target_modules))}."
    ]
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert [path for path, _, _ in spectral_modules(again)] == paths


@pytest.mark.parametrize("kind", list(IN_THE_TABLE))
def test_peft_s_own_choice_comes_first(kind: str) -> None:
    model, said = tuned(IN_THE_TABLE[kind])
    assert {path.rpartition(".")[2] for path, _, _ in spectral_modules(model)} == {"q_proj", "v_proj"} and not said


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.gate = nn.Linear(8, 8), nn.LayerNorm(8)


class AttentionBlock(nn.Module):
    """Own code: the same name `dense` inside and outside of the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.torchs, self.dense = Attention(), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.mixer.dense(x) + self.torchs(x, x, x)[0])


def test_a_model_of_one_s_own_has_its_attention_tuned_and_nothing_else() -> None:
    model, said = tuned(AttentionBlock)
    found = {path.removeprefix("base_model.model.") for path, _, _ in spectral_modules(model)}
    assert {path for path in found if "torchs" not in path} == {"mixer.dense"} and len(found) > 1
    assert "for AttentionBlock" in said[0] and "mixer.dense" in said[0] and "torchs" in said[0]
    with pytest.warns(UserWarning, match="no usual layers for AttentionBlock, so the 2 projections"):
        model.add_adapter("second", SpectralConfig(r=1))
    assert {path for path, name, _ in spectral_modules(model) if name == "second"} == {
        path for path, name, _ in spectral_modules(model) if name == "default"
    }


def test_a_model_without_attention_needs_its_targets_named() -> None:
    with pytest.raises(OptionError, match="PEFT's table has no usual layers"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), SpectralConfig())

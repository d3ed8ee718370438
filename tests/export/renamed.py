"""Tiny models whose tensors have other names, or other shapes, in files than in the live model (transformers 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEN = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3, "initializer_range": 0.2}
READ = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.2}

# Name -> (model, does it see pictures).
RENAMED: dict[str, tuple[Callable[[], Any], bool]] = {
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**SEEN)), True),
    "deit": (lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**SEEN)), True),
    "beit": (lambda: tf.BeitForImageClassification(tf.BeitConfig(**SEEN)), True),
    "vit_msn": (lambda: tf.ViTMSNForImageClassification(tf.ViTMSNConfig(**SEEN)), True),
    "dinov2": (lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**SEEN)), True),
    # Its one matrix of two parts in the file is two layers in the model.
    "dinov2-swiglu": (lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**SEEN, use_swiglu_ffn=True)), True),
    "swin": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                embed_dim=8,
                depths=[1, 1],
                num_heads=[2, 2],
                image_size=16,
                patch_size=2,
                window_size=4,
                num_labels=3,
                initializer_range=0.2,
            )
        ),
        True,
    ),
    "gpt_neox": (
        lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(
                **SMALL, vocab_size=64, initializer_range=0.2, max_position_embeddings=32, tie_word_embeddings=False
            )
        ),
        False,
    ),
    # Each expert's matrices in the file are one block of all experts in the model.
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**READ, num_local_experts=3)), False),
    "qwen2_moe": (
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(
                **READ,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                decoder_sparse_step=1,
            )
        ),
        False,
    ),
}
# What "all-linear" would also take: a router of one row.
LEFT = {"qwen2_moe": ["shared_expert_gate"]}


def inputs(sees: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if sees:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 60, (3, 6), generator=generator)}


def logits(model: Any, sees: bool) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(sees)).logits
    return found

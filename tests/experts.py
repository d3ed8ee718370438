"""Tiny models that store their experts in one parameter, as transformers 5 does: two layers of four experts each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA4 = {**SIZES, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.tensor([[5, 9, 33, 2, 60, 17, 8], [11, 40, 3, 7, 22, 51, 1]])

# In Mixtral and Qwen a matrix is stored out x in, in GPT-OSS and Llama 4 in x out.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, intermediate_size=24, moe_intermediate_size=24, num_experts=4)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4)),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**LLAMA4, intermediate_size=24, num_local_experts=4)),
}
IN_X_OUT = ("gpt-oss", "llama4")


def fresh(kind: str) -> nn.Module:
    """The same model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[kind]().eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits

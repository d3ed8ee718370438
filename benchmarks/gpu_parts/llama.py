"""Llama shapes with random weights made on the device: no file, no download."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

from spectune import SpectralConfig

from .notebook import Setting

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Llama 3.2 1B and 3B, Llama 3.1 8B: width, MLP, layers, heads, key-value heads (their config.json).
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (64, 128, 2, 4, 2),
    "1B": (2048, 8192, 16, 32, 8),
    "3B": (3072, 8192, 28, 24, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
# The decoder alone is measured: the head's logits would hide the rest, and the embedding's size moves nothing.
VOCABULARY = 1024
# Directions of every weight that stand out of the noise, s_i = i^-1/2 from the top; so many that a cut at 64 has a gap.
PLANTED = 96
NOISE = 0.02  # Llama's initializer_range
FLOOR, LORA = "frozen", "LoRA"


def llama(name: str, setting: Setting, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Get a decoder of one of SHAPES. Its weights have a decaying spectrum, as trained ones do: pure noise is the
    worst case of every solver and no model's weight."""
    width, mlp, all_layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device("meta"):
        empty = LlamaModel(config)
    rotary = LlamaModel(_without_layers(config)).rotary_emb  # its buffers are computed, not weights
    model = empty.to(dtype).to_empty(device=setting.device)
    model.rotary_emb = rotary.to(setting.device)
    random = torch.Generator(setting.device).manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, NOISE, generator=random)
                if path.split(".")[-2] in TARGETS:
                    plant(parameter, random)
    return model


def _without_layers(config: LlamaConfig) -> LlamaConfig:
    few = copy.deepcopy(config)
    few.num_hidden_layers = 1
    few.intermediate_size = 8
    return few


def plant(W_OI: torch.Tensor, random: torch.Generator) -> None:
    """Add leading directions above the noise, without a decomposition: s_i = 8 |noise| i^-1/2, random directions."""
    rows_O, cols_I = W_OI.shape
    count = min(PLANTED, min(rows_O, cols_I) // 2)
    largest = NOISE * (math.sqrt(rows_O) + math.sqrt(cols_I))
    kind = {"generator": random, "device": W_OI.device, "dtype": torch.float32}
    left_OR = torch.randn(rows_O, count, **kind) / math.sqrt(rows_O)
    right_RI = torch.randn(count, cols_I, **kind) / math.sqrt(cols_I)
    values_R = 8 * largest * torch.arange(1, count + 1, device=W_OI.device) ** -0.5
    W_OI += ((left_OR * values_R) @ right_RI).to(W_OI.dtype)


def sharing(model: nn.Module) -> nn.Module:
    """Get a copy whose weights and buffers are the model's own storage: only the modules are new."""
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, own)


def adapters(r: int) -> dict[str, Any]:
    """Get what is laid side by side; None is the frozen model."""
    return {
        FLOOR: None,
        LORA: LoraConfig(r=r, target_modules=TARGETS),
        "DoRA": LoraConfig(r=r, use_dora=True, target_modules=TARGETS),
        "spectral_a": SpectralConfig(method="spectral_a", r=r, target_modules=TARGETS),
        "spectral_r": SpectralConfig(method="spectral_r", r=r, target_modules=TARGETS),
        "svft, r directions": SpectralConfig(method="svft", basis_rank=r, target_modules=TARGETS),
    }


def adapted(base: nn.Module, config: Any) -> nn.Module:
    """Get the base with an adapter, training, on the base's own weights. Gradients flow to the first layer's input in
    every case, as with gradient checkpointing: no method is spared that product."""
    own = sharing(base).requires_grad_(False)
    model = own if config is None else get_peft_model(own, config)
    own.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model.train()


def tokens(count: int, row: int, setting: Setting) -> torch.Tensor:
    """Get a batch of `count` tokens in rows of `row`."""
    stream = torch.Generator().manual_seed(0)
    shape = (max(1, count // row), min(row, count))
    return torch.randint(0, VOCABULARY, shape, generator=stream).to(setting.device)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model(input_ids=ids).last_hidden_state
    return hidden.float().square().mean()

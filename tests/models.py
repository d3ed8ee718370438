"""Tiny models from configs, with the inputs that run them: no file, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

# Ten times the usual deviation, so that these tiny networks pass on what changes in their weights.
INIT = 0.2


@dataclass(frozen=True)
class Tiny:
    """A model, what to adapt in it, and inputs."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    inputs: Callable[[], dict[str, Any]]

    def fresh(self, seed: int = 0) -> nn.Module:
        """Get the same model every time, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().eval()


def ids(length: int = 6) -> torch.Tensor:
    return torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(7))


def tokens() -> dict[str, Any]:
    return {"input_ids": ids()}


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            pad_token_id=0,
            initializer_range=INIT,
        )
    )


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            pad_token_id=0,
            initializer_range=INIT,
        )
    )


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            num_labels=3,
            max_position_embeddings=32,
            initializer_range=INIT,
        )
    )


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=3,
            initializer_range=INIT,
        )
    )


class MLP(nn.Module):
    """A plain torch model without a transformers config."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))}


def vit_targets() -> tuple[str, ...]:
    """Get what transformers calls two projections and the first layer of the MLP: it renamed them after 5.6."""
    names = {name.rpartition(".")[2] for name, _ in vit().named_modules()}
    return ("q_proj", "v_proj", "fc1") if "fc1" in names else ("query", "value", "intermediate.dense")


def vectors() -> dict[str, Any]:
    return {"x": torch.randn(5, 10, generator=torch.Generator().manual_seed(7))}


MODELS: dict[str, Tiny] = {
    "llama": Tiny(llama, ("q_proj", "v_proj", "down_proj"), tokens),
    "gpt2": Tiny(gpt2, ("c_attn", "c_fc"), tokens),
    "bert": Tiny(bert, ("query", "value"), tokens),
    "t5": Tiny(t5, ("q", "v", "wo"), lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)}),
    "vit": Tiny(vit, vit_targets(), pixels),
    "mlp": Tiny(MLP, ("lin0", "lin1"), vectors),
}


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Get the logits (or the plain output) without a graph."""
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits

"""Tiny models from configs, and spectral adapters on them with random trained numbers."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig

from ..models import MODELS as TINY

VOCABULARY = 64
MODELS = {name: tiny.build for name, tiny in TINY.items() if name != "mlp"}
ALL_LLAMA = ["q_proj", "k_proj", "down_proj"]
# (model, options of the config); every line is exported and read by plain PEFT.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-spectral_a": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "llama-svft-rectangular": ("llama", {"method": "svft", "target_modules": ALL_LLAMA, "task_type": "CAUSAL_LM"}),
    "llama-svft-dense": (
        "llama",
        {"method": "svft", "pattern": "dense", "core": [12, 7], "target_modules": ALL_LLAMA},
    ),
    "llama-svft-random": (
        "llama",
        {"method": "svft", "pattern": "random", "basis_rank": 12, "target_modules": ALL_LLAMA},
    ),
    "llama-rank_pattern": (
        "llama",
        {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 7}, "target_modules": ALL_LLAMA},
    ),
    "llama-wider-than-the-weight": ("llama", {"r": 14, "target_modules": ["k_proj", "q_proj"]}),
    "llama-one-layer": ("llama", {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "bert-classifier": ("bert", {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-modules_to_save": (
        "bert",
        {"r": 2, "target_modules": ["dense"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "gpt2-conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}),
    "gpt2-mixed-layouts": ("gpt2", {"r": 2, "target_modules": ["c_attn", "lm_head"]}),
    **{
        f"method-{method}": ("llama", {"method": method, "target_modules": ["q_proj", "v_proj", "up_proj"]})
        for method in METHODS
    },
    "t5": ("t5", {"r": 2, "target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "vit": ("vit", {"r": 2, "target_modules": "all-linear", "modules_to_save": ["classifier"]}),
}


def adapted(case: str, base: nn.Module | None = None, **options: Any) -> PeftModel:
    """Get a model with an adapter whose trained numbers are random, and its fully trained modules too."""
    torch.manual_seed(0)
    name, given = CASES[case]
    model = get_peft_model(base or MODELS[name](), SpectralConfig(**{"init_weights": False, **given, **options}))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(VOCABULARY, (2, 9), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(0)} if name == "t5" else {"input_ids": ids}

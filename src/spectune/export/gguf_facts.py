"""What a GGUF file says of its model besides the tensors: sizes, attention, positions."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import ExportError
from .gguf_family import Family

# Names that configs of transformers give to the same thing.
SAME = {
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"),
}
# Layers whose rotation llama.cpp knows by their number: every sixth of Gemma 3 attends to all, every fourth of SmolLM3
# has no positions (src/models/gemma3.cpp, smollm3.cpp). Its base for the others in Gemma 3 is fixed, too.
GEMMA3_EVERY, GEMMA3_LOCAL, SMOLLM3_EVERY = 6, 10_000.0, 4

# Families whose sliding window the file holds; llama.cpp reads Phi-3's and does not use it (src/models/phi3.cpp).
WINDOWED = ("gemma2", "gemma3", "phi3")


def looks_further(family: Family, config: Any) -> int | None:
    """Get the sliding window of transformers where llama.cpp looks at all tokens instead; None where both agree."""
    used = getattr(config, "use_sliding_window", True) and family.arch not in ("gemma2", "gemma3")
    return said(config, "sliding_window") if used else None


def said(config: Any, name: str) -> Any:
    """Get a value of a config under any of the names that it may have; None where there is none."""
    return next((v for key in SAME.get(name, (name,)) if (v := getattr(config, key, None)) is not None), None)


def add_facts(writer: Any, family: Family, config: Any) -> None:
    """Write the sizes of a model, as llama.cpp's converter does (conversion/base.py and the file of the family)."""
    heads, width = said(config, "num_attention_heads"), said(config, "hidden_size")
    writer.add_block_count(said(config, "num_hidden_layers"))
    writer.add_context_length(said(config, "max_position_embeddings"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(said(config, "intermediate_size") or said(config, "n_inner") or 4 * width)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if (groups := said(config, "num_key_value_heads")) is not None:
        writer.add_head_count_kv(groups)
    if (eps := said(config, "rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(eps)
    if (eps := said(config, "layer_norm_eps")) is not None:
        writer.add_layer_norm_eps(eps)
    if family.arch != "gpt2":
        wide = getattr(config, "head_dim", None) or width // heads
        writer.add_key_length(wide)
        writer.add_value_length(wide)
        _add_rotation(writer, family, config, wide)
    _add_own(writer, family, config)


def refuse_unwritable(family: Family, config: Any, where: object) -> None:
    """Raise `ExportError` for what llama.cpp would compute otherwise than transformers, or what is not known here."""
    wrong = []
    rope = rotation(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        wrong.append(f"rope_type {rope['rope_type']}")
    wide = getattr(config, "head_dim", None)
    if family.arch in ("gemma2", "gemma3") and config.query_pre_attn_scalar != wide:
        wrong.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar} with head_dim {wide}")
    if family.arch == "gemma3":
        kinds = [
            "full_attention" if not (i + 1) % GEMMA3_EVERY else "sliding_attention"
            for i in range(len(config.layer_types))
        ]
        local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", GEMMA3_LOCAL)
        wrong += ["layer_types"] if list(config.layer_types) != kinds else []
        wrong += [f"rope_theta {local} of its sliding layers"] if local != GEMMA3_LOCAL else []
    if family.arch == "smollm3":
        rotates = [int((i + 1) % SMOLLM3_EVERY != 0) for i in range(len(config.no_rope_layers))]
        wrong += ["no_rope_layers"] if list(config.no_rope_layers) != rotates else []
    if wrong:
        raise ExportError(
            f"{where}: its config has {' and '.join(wrong)}, which llama.cpp computes otherwise or this export cannot "
            "write. Export with --to merged and try llama.cpp's convert_hf_to_gguf.py."
        )


def rotation(config: Any) -> dict[str, Any]:
    """Get the parameters of the rotary positions, of the layers that attend to everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def _add_rotation(writer: Any, family: Family, config: Any, wide: int) -> None:
    import gguf

    rope = rotation(config)
    if family.arch in ("llama", "phi3", "granite", "smollm3"):
        writer.add_rope_dimension_count(int(wide * (rope.get("partial_rotary_factor") or 1.0)))
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_own(writer: Any, family: Family, config: Any) -> None:
    """Write what only one family has."""
    window = said(config, "sliding_window")
    if family.arch in WINDOWED and (window or family.arch == "phi3"):  # 0 in Phi-4, which has none
        writer.add_sliding_window(window or 0)
    if family.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if family.arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def llama3_factors(config: Any) -> torch.Tensor | None:
    """Get by how much Llama 3.1 slows each rotation, which llama.cpp reads as a tensor; None for other models.

    1 for wavelengths under L / high, `factor` over L / low, and between the two 1 / ((1 - s) / factor + s) with
    s = (L / wavelength - low) / (high - low); L is the original context.  transformers, modeling_rope_utils.py.
    """
    rope = rotation(config)
    if rope.get("rope_type") != "llama3":
        return None
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, old = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, wide, 2, dtype=torch.float64) / wide)
    smooth = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()

"""`write_model`: a folder that transformers loads as one GGUF file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoint import Checkpoint, load_auto, open_checkpoint
from ..errors import ExportError
from .gguf_facts import add_facts, llama3_factors, refuse_unwritable
from .gguf_family import Family, Names, family_of, load_gguf, row_order, stored_matrix
from .gguf_words import add_words, read_words

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HEAD, EMBEDDING = "lm_head.weight", "token_embd.weight"
# Written by older versions of transformers, computed from the config by llama.cpp.
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """What is written for a model, checked before anything is."""

    family: Family
    config: Any
    names: dict[str, str]
    """transformers' name -> llama.cpp's, for every tensor."""


def plan_model(folder: Path, checkpoint: Checkpoint) -> ModelPlan:
    """Get what is written; `ExportError` for a model that cannot become a GGUF file."""
    config = load_auto(transformers.AutoConfig, folder)
    family = family_of(config, folder)
    refuse_unwritable(family, config, folder)
    tied = config.tie_word_embeddings
    own = [name for name in checkpoint.names if not name.endswith(COMPUTED) and not (tied and name == HEAD)]
    blocks = getattr(config, "num_hidden_layers", 0)
    names = Names(family, blocks).all_of(own, folder)
    rows = next((checkpoint.shapes[name][0] for name, theirs in names.items() if theirs == EMBEDDING), None)
    if rows != config.vocab_size:
        raise ExportError(
            f"{folder}: its config says vocab_size={config.vocab_size}, but the embedding has {rows or 'no'} rows. "
            "Save the model again."
        )
    return ModelPlan(family, config, names)


def write_model(folder: Path, file: Path, name: str, dtype: torch.dtype | None = None) -> ModelPlan:
    """Write the model of a folder as a GGUF file; matrices in `dtype` (None: as they are), vectors in float32.

    As llama.cpp's converter does, which keeps what has one dimension in float32. One tensor is in memory at a time.
    """
    gguf = load_gguf()
    checkpoint = open_checkpoint(folder)
    plan = plan_model(folder, checkpoint)
    words = read_words(folder, plan.config.vocab_size)
    kinds = {theirs: _kind(checkpoint, ours, dtype) for ours, theirs in plan.names.items()}
    writer = gguf.GGUFWriter(file, plan.family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    matrices = sorted(DTYPES[kind] for ours, theirs in plan.names.items() if (kind := kinds[theirs]) != torch.float32)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{matrices[0]}" if matrices else "ALL_F32"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_facts(writer, plan.family, plan.config)
    add_words(writer, words, folder, plan.config.vocab_size)
    for theirs, tensor in _tensors(plan, checkpoint):
        kind = kinds.get(theirs, torch.float32)
        size = tensor.numel() * kind.itemsize
        writer.add_tensor_info(theirs, tensor.shape, None, size, getattr(gguf.GGMLQuantizationType, DTYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, tensor in _tensors(plan, checkpoint, read=True):
        kind = kinds.get(theirs, torch.float32)
        rounded = tensor.to(kind).contiguous()
        if not torch.isfinite(rounded.float()).all():
            raise ExportError(f"{theirs}: too large for {DTYPES[kind]}, or not a number. Choose another --dtype.")
        writer.write_tensor_data(rounded.view(torch.int16).numpy() if kind != torch.float32 else rounded.numpy())
    writer.close()
    return plan


def _tensors(plan: ModelPlan, checkpoint: Checkpoint, read: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Get llama.cpp's names and tensors; without `read` only their shapes."""
    for ours, theirs in plan.names.items():
        tensor = checkpoint.tensor(ours) if read else torch.empty(checkpoint.shapes[ours], device="meta")
        tensor = stored_matrix(plan.family, ours, tensor)
        yield theirs, row_order(plan.family, plan.config, ours)(tensor)
    factors = llama3_factors(plan.config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _kind(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    own = checkpoint.dtypes[name]
    if len(checkpoint.shapes[name]) < 2:
        return torch.float32
    wanted = dtype or own
    if wanted not in DTYPES:
        raise ExportError(f"{name}: GGUF has no {wanted}. Choose --dtype float32, float16 or bfloat16.")
    return wanted

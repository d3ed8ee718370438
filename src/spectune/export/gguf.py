"""`export_gguf`: an adapter as llama.cpp's LoRA, or the base with the adapter merged in, as one GGUF file."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..adapter.saved import tensors_by_layer
from ..checkpoint import (
    CONFIG_LIMIT,
    PEFT_PREFIX,
    AdapterFolder,
    Base,
    find_base,
    fresh_folder,
    load_auto,
    read_adapter_folder,
    refuse_to_replace,
)
from ..checkpoint.config_limits import refuse_absurd_size
from ..checkpoint.reader import read_json
from ..errors import ExportError
from .card import GGUF, write_export_card
from .gguf_facts import looks_further
from .gguf_family import WEIGHT, Family, Names, family_of, load_gguf
from .gguf_lora import write_lora
from .gguf_model import DTYPES, EMBEDDING, HEAD, plan_model, write_model
from .gguf_words import refuse_unknown
from .lora import LoraExport, export_lora
from .merged import Merged, OnTensor, merge_checkpoint

ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file: where it is, what llama.cpp calls the architecture, and the proof."""

    path: Path
    """The file in its folder."""
    architecture: str
    dtype: str
    """What the matrices are stored in: F32, F16 or BF16."""
    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise than transformers, and what the file lacks."""
    lora: LoraExport | None = None
    """The exact LoRA that the file holds; None for a merged model."""
    merged: Merged | None = None
    """What merging changed and what rounding cost; None for an adapter."""


def export_gguf(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    merged: bool = False,
    dtype: torch.dtype | None = None,
    base_model: str | Path | None = None,
    overwrite: bool = False,
    pad: bool = True,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    on_tensor: OnTensor | None = None,
) -> GgufExport:
    """Write a saved adapter for llama.cpp: `adapter.gguf`, its LoRA format, or `model.gguf`, the base merged with it.

    The adapter is the exact LoRA of `export_lora`, with the same proof; `llama-cli -m BASE.gguf --lora adapter.gguf`
    computes W + (alpha / r) B A with the r of each tensor, so B is multiplied by r / alpha where ranks differ
    (`pad=False`). `dtype` is that of the matrices (default: float32 for an adapter, the base's for a model); a
    merged weight is computed in float32 and rounded once. `merged` also writes tokenizer and chat template.

    `ExportError`, before any work, for an architecture or a tokenizer that llama.cpp stores or reads in a way that is
    not known here, `MissingExtraError` without the package gguf; else as `export_lora` and `merge_checkpoint`.
    """
    load_gguf()
    folder = read_adapter_folder(adapter_dir).require("SPECTUNE")
    base = find_base(base_model, folder)
    refuse_to_replace(output_dir, folder.path, base.path)
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype={dtype}: GGUF matrices are float32, float16 or bfloat16 here. Choose one of them.")
    config = base_config(base)
    family = family_of(config, base.name)
    if merged:
        dtype = dtype or _common_dtype(base)
        if base.gguf is None:  # else merging refuses it
            plan_model(base.model_folder, base.checkpoint)
        notes = _notes(family, config, not refuse_unknown(folder.path, base.model_folder))
    else:
        _refuse_nameless(folder, family, config)
        dtype, notes = dtype or torch.float32, _notes(family, config, False)
    found: dict[str, Any] = {}
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        scratch = partial / ".before"
        if merged:
            found["merged"] = merge_checkpoint(
                base.name, folder.path, scratch, on_tensor=on_tensor, rounded_later=dtype
            )
            write_model(scratch, partial / MODEL_FILE, _title(base), dtype)
        else:
            limits = {"max_rank": max_rank, "allow_lossy": allow_lossy, "pad": pad}
            found["lora"] = export_lora(folder.path, scratch, base_model=base.name, dtype=dtype, **limits)  # type: ignore[arg-type]
            write_lora(read_adapter_folder(scratch), partial / ADAPTER_FILE, _title(base), family, config)
        shutil.rmtree(scratch)
        write_export_card(partial, GGUF, folder, base.name, notes)
    file = Path(output_dir, MODEL_FILE if merged else ADAPTER_FILE)
    return GgufExport(file, family.arch, DTYPES[dtype], notes, **found)


def base_config(base: Base) -> Any:
    """Get the config of a base, also of a GGUF file."""
    if base.gguf is not None:
        return load_auto(transformers.AutoConfig, base.gguf.parent, gguf_file=base.gguf.name)
    path = base.config_folder / "config.json"
    if not path.is_file():
        raise ExportError(f"{base.name}: it has no config.json, which says what model this is. Pass another --base.")
    refuse_absurd_size(path, read_json(path, CONFIG_LIMIT))
    return load_auto(transformers.AutoConfig, base.config_folder)


def _title(base: Base) -> str:
    return Path(base.name).name


def _common_dtype(base: Base) -> torch.dtype:
    shapes, dtypes = base.checkpoint.shapes, base.checkpoint.dtypes
    found = Counter(dtypes[name] for name, shape in shapes.items() if len(shape) > 1)
    return found.most_common(1)[0][0]


def _refuse_nameless(folder: AdapterFolder, family: Family, config: Any) -> None:
    """Raise `ExportError` for adapted layers that llama.cpp's LoRA cannot reach."""
    layers = [layer.removeprefix(PEFT_PREFIX) + WEIGHT for layer in tensors_by_layer(folder)]
    names = Names(family, config.num_hidden_layers).all_of(layers, folder.path)
    instead = "Use --to gguf --merged."
    for ours, theirs in names.items():
        if theirs == EMBEDDING or (ours == HEAD and config.tie_word_embeddings):
            raise ExportError(
                f"{folder.path}: {ours.removesuffix(WEIGHT)} is an embedding or shares its weight with one, and "
                f"llama.cpp keeps one tensor for both. {instead}"
            )
    whole = folder.config.get("modules_to_save") or folder.config.get("trainable_token_indices")
    if whole:
        raise ExportError(
            f"{folder.path}: {whole} was trained in full, and a LoRA in GGUF has no place for it. {instead}"
        )


def _notes(family: Family, config: Any, wordless: bool) -> tuple[str, ...]:
    notes = []
    if (window := looks_further(family, config)) is not None:
        notes.append(f"llama.cpp lets every token see all before it; transformers only the last {window}")
    if wordless:
        notes.append("no tokenizer.json beside the base, so the file has no tokenizer: it takes token numbers only")
    return tuple(notes)

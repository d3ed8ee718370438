"""`write_lora`: a LoRA folder as llama.cpp's adapter file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import PEFT_PREFIX, AdapterFolder
from ..errors import ExportError
from .gguf_family import WEIGHT, Family, Names, load_gguf, row_order

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def write_lora(folder: AdapterFolder, file: Path, title: str, family: Family, config: Any) -> None:
    """Write NAME.lora_a (r x in) and NAME.lora_b (out x r, its rows in llama.cpp's order) of every layer.

    llama.cpp scales each pair with adapter.lora.alpha / r, r being the pair's own (src/llama-adapter.h), where
    an exact LoRA has alpha / r = 1 in every layer: B is multiplied by r / adapter.lora.alpha. `ExportError` if what is
    written is not the same update.
    """
    gguf = load_gguf()
    stems = [name.removesuffix(LORA_A) for name in folder.names if name.endswith(LORA_A)]
    ours = {stem: stem.removeprefix(PEFT_PREFIX) for stem in stems}
    names = Names(family, config.num_hidden_layers).all_of([f"{layer}{WEIGHT}" for layer in ours.values()], folder.path)
    ranks = {stem: folder.shapes[stem + LORA_A][0] for stem in stems}  # alpha / r is 1 in every layer of an exact LoRA
    alpha = Counter(ranks.values()).most_common(1)[0][0]
    writer = gguf.GGUFWriter(file, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_name(f"{title} adapter")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, title)
    written = {}
    for stem, layer in ours.items():
        theirs, order = names[f"{layer}{WEIGHT}"], row_order(family, config, f"{layer}{WEIGHT}")
        A_PI, B_OP = folder.tensor(stem + LORA_A), folder.tensor(stem + LORA_B)
        scaled = (order(B_OP).double() * (ranks[stem] / alpha)).to(B_OP.dtype)
        written[theirs] = order(B_OP), A_PI
        _add(writer, f"{theirs}.lora_a", A_PI)
        _add(writer, f"{theirs}.lora_b", scaled)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(file, written)


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    half = tensor.dtype == torch.bfloat16
    kind = load_gguf().GGMLQuantizationType.BF16 if half else None
    tensor = tensor.contiguous()
    writer.add_tensor(name, tensor.view(torch.int16).numpy() if half else tensor.numpy(), raw_dtype=kind)


def _check(file: Path, written: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Read the file and compare (alpha / r) b a with B A; roundoff of the scaling is all that may differ."""
    gguf = load_gguf()
    reader = gguf.GGUFReader(file)
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    found = {
        part.name: torch.from_numpy(gguf.dequantize(part.data, part.tensor_type).copy()) for part in reader.tensors
    }
    for name, (B_OP, A_PI) in written.items():
        a, b = found[f"{name}.lora_a"].double(), found[f"{name}.lora_b"].double() * (alpha / len(A_PI))
        error = float((b @ a - B_OP.double() @ A_PI.double()).abs().max())
        bound = 2 * torch.finfo(B_OP.dtype).eps * float((B_OP.double().abs() @ A_PI.double().abs()).max())
        if not error <= bound:
            raise ExportError(
                f"{file.name}: {name} differs from the LoRA by {error:.1e}. Export again with --dtype float32."
            )

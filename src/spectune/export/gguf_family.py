"""How llama.cpp holds each model of transformers: its name for the architecture and the tensors, the order of rows.

Facts read in llama.cpp (conversion/*.py, src/llama-vocab.cpp); names come from the package gguf. llama.cpp itself
computed a model of each family, and the result was compared with transformers' (docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ExportError, MissingExtraError, nearest

WEIGHT, BIAS = ".weight", ".bias"
# Layers of GPT-2 whose weight is stored in x out.
CONV1D = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class Family:
    """What llama.cpp does with the models of one `model_type`."""

    arch: str
    rotates_neighbours: bool = False
    """True where it rotates neighbouring rows of a head, and not its two halves as transformers does."""
    shifts_norms: bool = False
    """True where it stores 1 + the weight of an RMSNorm."""


LLAMA = Family("llama", rotates_neighbours=True)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifts_norms=True),
    "gemma2": Family("gemma2", shifts_norms=True),
    "gemma3_text": Family("gemma3", shifts_norms=True),
    "phi3": Family("phi3"),
    "starcoder2": Family("starcoder2"),
    "granite": Family("granite", rotates_neighbours=True),
    "smollm3": Family("smollm3", rotates_neighbours=True),
    "olmo2": Family("olmo2"),
    "gpt2": Family("gpt2"),
}


def family_of(config: Any, where: object) -> Family:
    """Get the family of a model by its config; `ExportError` for one that is not known here."""
    kind = str(getattr(config, "model_type", None))
    if kind not in FAMILIES:
        raise ExportError(
            f"{where}: how llama.cpp stores a {kind} model is not known here. {nearest(kind, list(FAMILIES))} Or "
            "export with --to merged and use llama.cpp's convert_hf_to_gguf.py."
        )
    return FAMILIES[kind]


def load_gguf() -> Any:
    """Get the package gguf; `MissingExtraError` names the extra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("--to gguf: the package gguf is needed. Run: pip install 'spectune[gguf]'") from None
    return gguf


class Names:
    """llama.cpp's names for the tensors of one model."""

    def __init__(self, family: Family, blocks: int) -> None:
        gguf = load_gguf()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._map = gguf.get_tensor_name_map(arch, blocks)

    def of(self, name: str) -> str | None:
        """Get the name of a tensor, or None if the architecture has no such tensor."""
        found: str | None = self._map.get_name(name, try_suffixes=(WEIGHT, BIAS))
        return found

    def all_of(self, names: Iterable[str], where: object) -> dict[str, str]:
        """Get name -> llama.cpp's; `ExportError` for the first that it has no place for."""
        found = {name: self.of(name) for name in names}
        missing = sorted(name for name, theirs in found.items() if theirs is None)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ExportError(
                f"{where}: llama.cpp has no name for the tensor {missing[0]!r}{more}, so this model cannot become a "
                "GGUF file. Export with --to merged and use llama.cpp's convert_hf_to_gguf.py."
            )
        return {name: theirs for name, theirs in found.items() if theirs is not None}


def row_order(family: Family, config: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Get what puts the rows of a weight, of its bias, or of a LoRA's B into llama.cpp's order.

    Where it rotates neighbours, row 2 i + h of a head is row h d/2 + i of transformers (h = 0, 1; d rows a head), for
    q and k alone (conversion/llama.py, permute).
    """
    layer = name.removesuffix(WEIGHT).removesuffix(BIAS).rpartition(".")[2]
    if not family.rotates_neighbours or layer not in ("q_proj", "k_proj"):
        return lambda rows: rows
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads

    def permute(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return permute


def stored_matrix(family: Family, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Get a tensor as llama.cpp stores it but for the order of its rows: out x in, with norms shifted."""
    path = name.removesuffix(WEIGHT)
    if family.arch == "gpt2" and path.endswith(CONV1D) and tensor.ndim == 2:
        return tensor.T
    return tensor + 1 if family.shifts_norms and path.endswith("norm") else tensor

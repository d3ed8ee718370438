"""`export_lora`: a spectral adapter as an ordinary LoRA folder, exact and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algebra import to_factors, truncate
from ..checkpoint import (
    PEFT_PREFIX,
    TensorFile,
    adapter_path,
    fresh_folder,
    read_adapter_folder,
    refuse_to_replace,
    save_tensors,
    write_atomically,
)
from ..checkpoint.task_file import Task
from ..errors import ExportError, nearest
from .card import LORA, write_export_card
from .companions import copy_companions
from .layers import AdaptedLayer, adapted_layers, in_double, inner_model
from .lora_config import lora_config, refuse_trained_biases
from .readers import refusals, vllm_rank
from .source import Source, open_source
from .stacked import Pair, StackPlace, stack_factors
from .verify import Proof, verify_lora

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIFFUSERS_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraExport:
    """An exported LoRA: its folder, the rank of every layer, and the proof that it is exact."""

    path: Path
    adapter_name: str
    ranks: dict[str, int] = field(repr=False)
    """Layer -> rank of its two factors, as they are stored."""
    proof: Proof = field(repr=False)
    lost: dict[str, float] = field(default_factory=dict, repr=False)
    """Layer -> share of its update (Frobenius norm) that `max_rank` cut off; empty when nothing was cut."""
    exact_ranks: dict[str, int] = field(default_factory=dict, repr=False)
    """Layer -> rank of its factors before padding."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reader (vLLM, SGLang, llama.cpp) -> why it would refuse the folder, or misread it."""

    @property
    def max_rank(self) -> int:
        """The largest rank of all layers; a server must allow it."""
        return max(self.ranks.values())

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The value for vLLM's --max-lora-rank; None if the rank is larger than vLLM serves."""
        return vllm_rank(self.max_rank)


def export_lora(
    adapter: nn.Module | str | Path,
    output_dir: str | Path,
    *,
    base_model: nn.Module | str | Path | None = None,
    adapter_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    pad: bool = True,
    pad_to: int | None = None,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    diffusers: str | None = None,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    check_logits: bool = True,
) -> LoraExport:
    """Write a spectral adapter as a LoRA folder that PEFT, diffusers and vLLM load without Spectune.

    dW_OI = B_OP A_PI, from the algebra of the update, never from an SVD of it; scaling alpha / r = 1.

    `adapter` is a model with spectral adapters, or the folder of a saved one, which is loaded onto
    `base_model` (a model, which is copied; a folder or repository; default: the one that the config names).
    `dtype` is that of the factors: anything below float32 rounds them, and the proof allows for exactly
    that. Layers of several ranks are padded with zeros to the largest, since llama.cpp, SGLang and vLLM read one alpha
    or one rank for the whole file; `pad=False` keeps each layer's own rank, `pad_to` pads to a larger one. The logits
    are compared on `inputs` (default: a seeded random batch); `check_logits=False` skips that.

    `max_rank` cuts wider updates to their best approximation of that rank, by QR of the factors. That loses
    something, so it needs `allow_lossy=True`, and `LoraExport.lost` says how much for every layer.

    `diffusers` names the part of a pipeline that the model is (`unet`, `transformer`, `text_encoder`): a second file,
    `pytorch_lora_weights.safetensors`, then holds the same factors under the names that its pipelines load.

    The folder appears only when it is complete and its proof holds. `OutputError` for an output folder
    that is not empty, `ExportError` for what has no exact LoRA, `AdapterError` for a damaged adapter.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ExportError(f"dtype={dtype}: a LoRA can only be stored as {known}. Choose one of them.")
    given = [adapter_path(adapter)] if isinstance(adapter, (str, Path)) else []
    refuse_to_replace(output_dir, *given, *([base_model] if isinstance(base_model, (str, Path)) else []))
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        source = open_source(adapter, base_model, adapter_name)
        # Where the base came from is known only now, and nothing is replaced before the block ends.
        named = source.base.path if source.base else getattr(inner_model(source.model), "name_or_path", None)
        refuse_to_replace(output_dir, *([named] if named else []))
        layers = adapted_layers(source.model, source.adapter_name)
        refuse_trained_biases(source.model, source.adapter_name)
        lost = _losses(layers, max_rank, allow_lossy)
        if pad_to is not None and not pad:
            raise ExportError(f"pad_to={pad_to}: with pad=False no layer is padded. Leave one of them out.")
        ranks, exact_ranks = _write(source, layers, partial, dtype, pad, pad_to, max_rank)
        proof = verify_lora(
            source.model, source.adapter_name, partial, inputs, check_logits=check_logits, exact=not any(lost.values())
        )
        if diffusers is not None:
            _write_for_diffusers(partial, diffusers)
        _write_beside(adapter, source, partial)
        folder = None if isinstance(adapter, nn.Module) else read_adapter_folder(adapter)
        write_export_card(partial, LORA, folder, str(named or ""))
        refused = refusals(read_adapter_folder(partial))
    return LoraExport(Path(output_dir), source.adapter_name, ranks, proof, lost, exact_ranks, refused)


def _write_beside(adapter: nn.Module | str | Path, source: Source, folder: Path) -> None:
    """Write the names of the classes, and of a saved adapter the tokenizer and processor that it was trained with."""
    inner: Any = inner_model(source.model)
    if not isinstance(adapter, nn.Module):
        copy_companions(adapter_path(adapter), folder)
    elif "Classification" in type(inner).__name__ and source.carried:
        Task.of(inner.config, type(inner).__name__).write(folder)


def _write_for_diffusers(folder: Path, part: str) -> None:
    """Write the factors again under the names of diffusers' pipelines; without an alpha their scaling is one."""
    if part not in DIFFUSERS_PARTS:
        raise ExportError(f"diffusers={part!r} is not a part of a pipeline. {nearest(part, DIFFUSERS_PARTS)}")
    lora = TensorFile.open(folder / "adapter_model.safetensors")
    factors = [name for name in lora.names if ".lora_" in name]
    tensors = {f"{part}.{name.removeprefix(PEFT_PREFIX)}": lora.tensor(name) for name in factors}
    save_tensors(folder / "pytorch_lora_weights.safetensors", tensors)


@torch.no_grad()
def _losses(layers: list[AdaptedLayer], max_rank: int | None, allow_lossy: bool) -> dict[str, float]:
    """Get layer -> share of the update that cutting to `max_rank` loses; `ExportError` if that was not allowed."""
    if max_rank is None:
        return {}
    if max_rank < 1:
        raise ExportError(f"max_rank={max_rank} must be at least 1.")
    lost = {layer.name: truncate(*to_factors(in_double(layer.module.delta())), max_rank)[2] for layer in layers}
    # Below this nothing is lost but float64's roundoff.
    lost = {name: share if share > 1e-12 else 0.0 for name, share in lost.items()}
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] and not allow_lossy:
        cut = sum(share > 0 for share in lost.values())
        raise ExportError(
            f"{worst}: cutting to rank {max_rank} loses {lost[worst]:.1%} of this update, and something in {cut} of "
            f"{len(lost)} layers. Leave max_rank out for the exact LoRA, or pass --allow-lossy."
        )
    return lost


def _write(
    source: Source,
    layers: list[AdaptedLayer],
    folder: Path,
    dtype: torch.dtype,
    pad: bool,
    pad_to: int | None,
    max_rank: int | None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Write tensors and config; get layer -> rank, as written and before padding."""
    tensors = dict(source.carried)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ExportError(
                f"{name}: trained in full, and contains NaN or infinity. Train or copy the adapter again."
            )
    factors = {layer: lora_factors(layer, dtype, max_rank) for layer in layers}
    exact: dict[str, int] = {}
    for layer, (_, A_PI) in factors.items():
        exact[layer.target] = max(len(A_PI), exact.get(layer.target, 1))
    goal = pad_to or (max(exact.values()) if pad else 1)
    _refuse_narrow(exact, pad_to)
    ranks = {name: max(goal, rank) for name, rank in exact.items()}
    stacks: dict[str, tuple[StackPlace, dict[int, Pair]]] = {}
    for layer, (B_OP, A_PI) in factors.items():
        missing = ranks[layer.target] - len(A_PI)
        B_OP, A_PI = nn.functional.pad(B_OP, (0, missing)), nn.functional.pad(A_PI, (0, 0, 0, missing))
        if layer.place is None:
            tensors |= _named(layer.key, B_OP, A_PI)
        else:
            stacks.setdefault(layer.target, (layer.place, {}))[1][layer.place.index] = B_OP, A_PI
    for place, experts in stacks.values():
        tensors |= _named(place.key, *stack_factors(place, experts))
    transposed = any(layer.fan_in_fan_out for layer in layers)
    config = lora_config(
        source.model,
        source.adapter_name,
        ranks,
        transposed,
        None if source.base is None else source.base.name,
        set(stacks),
    )
    save_tensors(folder / "adapter_model.safetensors", tensors)
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return ranks, exact


def _refuse_narrow(exact: Mapping[str, int], pad_to: int | None) -> None:
    widest = max(exact, key=lambda name: exact[name])
    if pad_to is not None and pad_to < exact[widest]:
        raise ExportError(
            f"{widest}: pad_to={pad_to} is less than the rank of this update ({exact[widest]}). Pad to {exact[widest]} "
            "or more."
        )


def _named(key: str, lora_B: torch.Tensor, lora_A: torch.Tensor) -> dict[str, torch.Tensor]:
    stem = f"{PEFT_PREFIX}{key}"
    return {f"{stem}.lora_A.weight": lora_A, f"{stem}.lora_B.weight": lora_B}


@torch.no_grad()
def lora_factors(
    layer: AdaptedLayer, dtype: torch.dtype = torch.float32, max_rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Get (B_OP, A_PI) on the CPU with B A = dW: computed in float64, rounded once to `dtype`.

    P is at least 1 and at most min(O, I).
    """
    B_OP, A_PI = to_factors(in_double(layer.module.delta()))
    if max_rank is not None and max_rank < A_PI.shape[0]:
        B_OP, A_PI, _ = truncate(B_OP, A_PI, max_rank)
    rows_O, cols_I, P = B_OP.shape[0], A_PI.shape[1], A_PI.shape[0]
    if min(rows_O, cols_I) < P:
        # Wider than the weight itself: dW and an identity hold it in less room.
        dW_OI = B_OP @ A_PI
        one = torch.eye(min(rows_O, cols_I), dtype=dW_OI.dtype, device=dW_OI.device)
        B_OP, A_PI = (one, dW_OI) if rows_O <= cols_I else (dW_OI, one)
        P = one.shape[0]
    missing = max(1 - P, 0)  # an update of nothing is one direction of zeros
    B_OP, A_PI = nn.functional.pad(B_OP, (0, missing)), nn.functional.pad(A_PI, (0, 0, 0, missing))
    factors = B_OP.to("cpu", dtype), A_PI.to("cpu", dtype)
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise ExportError(
            f"{layer.name}: the update in {str(dtype).removeprefix('torch.')} contains NaN or infinity. Train again "
            "with a lower learning rate, or export in float32."
        )
    return factors

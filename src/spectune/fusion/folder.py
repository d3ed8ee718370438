"""A fused adapter as a folder: `spectral_a` with its directions, or a LoRA of stated rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..algebra import to_factors
from ..checkpoint import PEFT_PREFIX, fresh_folder, save_tensors, write_atomically
from ..errors import AdapterError, ExportError
from .adapters import MIDDLE
from .contract import Part
from .experts import refuse_lora_of, split_targets
from .spectral import method_on, richest

# Below this share nothing is lost but float64's roundoff.
NOTHING = 1e-12


@dataclass(frozen=True)
class Saved:
    """A fused adapter on the disk."""

    path: Path
    kind: str
    """`spectral_a` or `lora`."""
    ranks: dict[str, int] = field(repr=False)
    """Layer -> rank of the LoRA, or of the LoRA that the spectral_a adapter exports to."""
    error: float
    """Largest |saved - fused|_F / |fused|_F of a layer from rounding the file to float32; cut layers do not count."""
    lost: dict[str, float] = field(default_factory=dict, repr=False)
    """Layer -> share of its update (Frobenius norm) that `max_rank` cut off; empty when nothing was cut."""

    @property
    def max_rank(self) -> int:
        """The largest rank of all layers."""
        return max(self.ranks.values())


def save_spectral(
    output_dir: str | Path,
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    carried: Mapping[str, torch.Tensor],
    overwrite: bool,
) -> Saved:
    """Write a spectral_a adapter together with its directions, so that nothing needs to be computed again."""
    tensors, ranks, error = dict(carried), {}, 0.0
    columns = sorted({column for part in parts.values() for column in part.columns})
    method = richest(parts.values())
    for layer, part in parts.items():
        assert part.basis is not None and part.method is not None
        basis = part.basis.to(dtype=torch.float32)
        trained = {name: tensor.float() for name, tensor in part.trained.items()}
        whole = method_on(part.columns, [*parts.values()])  # one config for all layers
        for name, shape in whole.trained_shapes(*part.delta.shape).items():
            trained.setdefault(name, torch.zeros(shape))
        _refuse_non_finite(layer, *trained.values())
        stem = f"{PEFT_PREFIX}{layer}{MIDDLE}"
        tensors |= {stem + name: tensor for name, tensor in trained.items()}
        tensors |= {stem + name: getattr(basis, name) for name in ("U_OR", "S_R", "Vh_RI")}
        stored = part.method.delta(basis.to(dtype=torch.float64), {n: t.double() for n, t in trained.items()}, {})
        error = max(error, _difference(part, *to_factors(stored)))
        ranks[layer] = part.method.exact_rank(*part.delta.shape)
    written = {
        "peft_type": "SPECTUNE",
        "method": "spectral_a",
        **{name: value for name, value in vars(method).items() if value != method.options()[name]},
        "r": len(columns),
        "columns": list(columns),
        "save_basis": "always",
        **_targets(config, list(parts)),
    }
    _write(output_dir, tensors, written, overwrite)
    return Saved(Path(output_dir), "spectral_a", ranks, error)


def save_lora(
    output_dir: str | Path,
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    carried: Mapping[str, torch.Tensor],
    max_rank: int | None,
    allow_lossy: bool,
    overwrite: bool,
    pad: bool = True,
) -> Saved:
    """Write a LoRA with scaling 1 whose rank in every layer is that of the update, or at most `max_rank`.

    With `pad` all layers then get the largest of these ranks, with zeros: llama.cpp and SGLang read one for the file.
    """
    refuse_lora_of(parts, config.get("target_parameters") or (), "as_lora")
    if max_rank is not None and max_rank < 1:
        raise ExportError(f"max_rank={max_rank} must be at least 1.")
    tensors, ranks, lost, error = dict(carried), {}, {}, 0.0
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, part in parts.items():
        _refuse_embedding(layer, part)
        whole = part.compact
        exact = max(len(whole.S_P), 1)
        rank = min(exact, max_rank or exact)
        found_OP, found_PI, share = whole.factors(rank)
        lost[layer] = share if share > NOTHING else 0.0
        B_OP, A_PI, ranks[layer] = found_OP.float(), found_PI.float(), rank
        _refuse_non_finite(layer, B_OP, A_PI)
        error = error if lost[layer] else max(error, _rounding(found_OP, found_PI, whole.size))
        factors[layer] = B_OP, A_PI
    for layer in parts:
        B_OP, A_PI = factors.pop(layer)  # a large result is not held twice
        ranks[layer] = max(ranks.values()) if pad else ranks[layer]
        rank, kernel = ranks[layer], parts[layer].stored.kernel
        if missing := rank - len(A_PI):
            B_OP, A_PI = functional.pad(B_OP, (0, missing)), functional.pad(A_PI, (0, 0, 0, missing))
        tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = A_PI.reshape(rank, -1, *kernel) if kernel else A_PI
        tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = B_OP.reshape(*B_OP.shape, *(1 for _ in kernel))
    _refuse_loss(lost, max_rank, allow_lossy)
    transposed = any(part.stored.transposed for part in parts.values())
    written = {"peft_type": "LORA", **_ranks(ranks), "fan_in_fan_out": transposed, "bias": "none", "lora_dropout": 0.0}
    fields = {name: value for name, value in config.items() if name != "format_version"}  # ours, unknown to PEFT's LoRA
    _write(output_dir, tensors, {**written, **_targets(fields, list(parts))}, overwrite)
    return Saved(Path(output_dir), "lora", ranks, error, {} if max_rank is None else lost)


def _refuse_loss(lost: Mapping[str, float], max_rank: int | None, allow_lossy: bool) -> None:
    worst = max(lost, key=lambda layer: lost[layer])
    if lost[worst] and not allow_lossy:
        cut = sum(share > 0 for share in lost.values())
        raise ExportError(
            f"{worst}: cutting to rank {max_rank} loses {lost[worst]:.1%} of this update, and something in {cut} of "
            f"{len(lost)} layers. Leave max_rank out, or pass --allow-lossy."
        )


def _refuse_embedding(layer: str, part: Part) -> None:
    leaf = layer.rpartition(".")[2]
    # A checkpoint stores an embedding in x out, as Conv1D; only its usual names tell them apart.
    if part.stored.transposed and ("emb" in leaf or leaf in ("wte", "wpe", "shared")):
        raise ExportError(f"{layer}: a LoRA of an embedding cannot be written here. Train without it.")


def _refuse_non_finite(layer: str, *tensors: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise AdapterError(f"{layer}: the fused adapter contains NaN or infinity. Check the adapters and weights.")


def _difference(part: Part, B_OP: torch.Tensor, A_PI: torch.Tensor) -> float:
    """Get |B A - dW|_F / |dW|_F, from the factors."""
    left_OP, right_PI = to_factors(part.delta)
    size = _norm(left_OP, right_PI)
    return _norm(torch.cat([B_OP, -left_OP], dim=1), torch.cat([A_PI, right_PI])) / size if size else 0.0


def _rounding(B_OP: torch.Tensor, A_PI: torch.Tensor, size: float) -> float:
    """Get a bound of |b a - B A|_F / |B A|_F for b, a rounded to float32.

    B = X S^(1/2) and A = S^(1/2) Y with orthonormal X and Y, so |(b - B) A| and |B (a - A)| are the norms of the
    roundings with their columns and rows scaled; (b - B) (a - A) is of second order and left out.
    """
    root_P = torch.linalg.vector_norm(A_PI, dim=1)
    left, right = (B_OP.float() - B_OP) * root_P, root_P[:, None] * (A_PI.float() - A_PI)
    return float(torch.linalg.vector_norm(left) + torch.linalg.vector_norm(right)) / size if size else 0.0


def _norm(B_OP: torch.Tensor, A_PI: torch.Tensor) -> float:
    R_left, R_right = torch.linalg.qr(B_OP, mode="r").R, torch.linalg.qr(A_PI.mT, mode="r").R
    return float(torch.linalg.vector_norm(R_left @ R_right.mT))


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Get r and the patterns for layers of another rank; alpha equals the rank, so the scaling is 1 everywhere."""
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    # PEFT reads a pattern as a regex for the end of a name; ^ and the escape make it this name alone.
    pattern = {f"^{re.escape(layer)}": rank for layer, rank in sorted(ranks.items()) if rank != r}
    return {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _targets(config: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """Get the shared fields, with the parts' own targets if they agree, or else a regex of exactly these layers."""
    if "target_modules" in config:
        return dict(config)
    plain, parameters = split_targets(layers, config.get("target_parameters") or ())
    exact: Any = "|".join(re.escape(layer) for layer in plain) or []
    return {"target_modules": exact, **config, "target_parameters": parameters or None}


def _write(
    output_dir: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], overwrite: bool
) -> None:
    for name, tensor in tensors.items():
        _refuse_non_finite(name, tensor.float())
    with fresh_folder(output_dir, overwrite=overwrite) as folder:
        save_tensors(folder / "adapter_model.safetensors", tensors)
        said = {name: value for name, value in config.items() if value is not None}
        write_atomically(folder / "adapter_config.json", json.dumps(said, indent=2, sort_keys=True) + "\n")

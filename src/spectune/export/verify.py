"""`verify_lora`: the proof that a LoRA folder is the spectral adapter, layer by layer and in the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algebra import dense
from ..checkpoint import PEFT_PREFIX, AdapterFolder, read_adapter_folder
from ..errors import ExportError
from ..records import Delta
from .layers import AdaptedLayer, adapted_layers, choose_adapter, in_double
from .logits import LogitProof, compare_logits
from .stacked import unstack_factors

# Rows of dW compared at a time: 1024 rows of 16384 float64 are 128 MiB. Chosen, not measured.
BLOCK_ROWS = 1024
# Fields of a LoRA config that must agree for alpha / r to be 1 in every layer.
ALPHAS, RANKS = ("lora_alpha", "alpha_pattern"), ("r", "rank_pattern")


@dataclass(frozen=True)
class LayerProof:
    """How far B A in the file is from the update dW of one layer, in float64."""

    name: str
    rank: int
    error: float
    """max |B A - dW|."""
    largest: float
    """max |dW|."""
    bound: float
    """The error that rounding the factors to the dtype of the file explains; a larger one is refused."""

    @property
    def relative(self) -> float:
        """The error as a fraction of max |dW|; 0 for an exact update of zero."""
        return self.error / self.largest if self.largest else (0.0 if not self.error else float("inf"))


@dataclass(frozen=True)
class Proof:
    """The comparison of a LoRA folder with the adapter that it was made from."""

    layers: tuple[LayerProof, ...]
    logits: LogitProof

    @property
    def max_relative_error(self) -> float:
        """The worst layer's error, as a fraction of its max |dW|."""
        return max(layer.relative for layer in self.layers)

    def table(self) -> list[tuple[str, int, float, float]]:
        """Get one row per layer: name, rank, max |dW error|, the same as a fraction of max |dW|."""
        return [(layer.name, layer.rank, layer.error, layer.relative) for layer in self.layers]

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        layers = [asdict(layer) | {"relative": layer.relative} for layer in self.layers]
        return {
            "layers": layers,
            "max_relative_error": self.max_relative_error,
            "logits": asdict(self.logits),
        }


@torch.no_grad()
def verify_lora(
    model: nn.Module,
    adapter_name: str | None,
    lora_folder: str | Path,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    *,
    check_logits: bool = True,
    exact: bool = True,
) -> Proof:
    """Compare a LoRA folder, read again from the disk, with a spectral adapter in a live model.

    Per layer max |B A - dW|; for the model max |logit difference| with the adapter's own update and
    with that of the file, on `inputs` (keyword arguments of the model, or one tensor) or on a seeded
    random batch. `ExportError` if roundoff cannot explain a difference, or if layers are missing.
    `exact=False` only measures, for a LoRA that was cut on purpose.
    The comparison runs on this machine: it says nothing about a server that computes in another precision.
    """
    adapter_name = choose_adapter(model, adapter_name)
    folder = read_adapter_folder(lora_folder).require("LORA")
    layers = adapted_layers(model, adapter_name)
    factors = _StoredFactors(folder, layers)
    proofs = tuple(_compare_layer(layer, *factors.of(layer)) for layer in layers)
    for proof in proofs:
        # A NaN compares false, so ask for what must hold.
        if exact and not proof.error <= proof.bound:
            raise ExportError(
                f"{proof.name}: the exported factors differ from the update by {proof.error:.1e} (max |dW| is "
                f"{proof.largest:.1e}), more than rounding explains ({proof.bound:.1e}). Export the adapter again, in "
                "float32."
            )
    if not check_logits:
        return Proof(proofs, LogitProof(skipped="check_logits is off"))
    by_module = {layer.module: factors.of(layer) for layer in layers}
    return Proof(proofs, compare_logits(model, adapter_name, by_module, inputs, exact))


class _StoredFactors:
    """The factors in a LoRA folder, with the scaling that its config gives them."""

    def __init__(self, folder: AdapterFolder, layers: list[AdaptedLayer]) -> None:
        self.folder = folder
        wanted = {f"{PEFT_PREFIX}{layer.key}.lora_{side}.weight" for layer in layers for side in "AB"}
        found = {name for name in folder.names if ".lora_" in name}
        if wanted != found:
            name = min(wanted ^ found)
            raise ExportError(
                f"{folder.path}: the file does not match the {len(layers)} adapted layers of the model: it "
                f"{'lacks' if name in wanted else 'also has'} {name!r}. Export the adapter again."
            )
        config = folder.config
        alphas, ranks = ([config.get(key) for key in keys] for keys in (ALPHAS, RANKS))
        changing = [name for name in ("use_rslora", "use_dora") if config.get(name)]
        if alphas != ranks or changing:
            what = ", ".join(changing) or f"alpha {alphas}, ranks {ranks}"
            raise ExportError(
                f"{folder.path}: every layer must have scaling 1, but the config has {what}. Export the adapter again."
            )

    def of(self, layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (B_OP, A_PI) of one layer, on its device, in the dtype of the file."""
        stem, device = f"{PEFT_PREFIX}{layer.key}.lora_", layer.module.S_R.device
        B_OP, A_PI = (self.folder.tensor(f"{stem}{side}.weight").to(device) for side in "BA")
        return (B_OP, A_PI) if layer.place is None else unstack_factors(layer.place, B_OP, A_PI)


def _compare_layer(layer: AdaptedLayer, B_OP: torch.Tensor, A_PI: torch.Tensor) -> LayerProof:
    delta = in_double(layer.module.delta())
    if (B_OP.shape[0], A_PI.shape[1]) != delta.shape or B_OP.shape[1] != A_PI.shape[0]:
        raise ExportError(
            f"{layer.name}: the factors are {tuple(B_OP.shape)} and {tuple(A_PI.shape)}, but the update is "
            f"{tuple(delta.shape)}. Export the adapter again."
        )
    error = largest = size = 0.0
    for start in range(0, delta.shape[0], BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        dW_OI = dense(Delta(delta.left_OP[part], delta.core, delta.right_QI))
        B, A = B_OP[part].double(), A_PI.double()
        error = _worst(error, B @ A - dW_OI)
        largest = _worst(largest, dW_OI)
        size = _worst(size, B.abs() @ A.abs())
    # Rounding b and a to the file's dtype changes b a by at most (2u + u^2)|b||a|, u = eps / 2; summed over
    # the width that is eps max(|B||A|). The factor 2 is for the float64 sums.
    # Factors that underflow in float16 exceed it, and shall: then the update is lost.
    bound = 2 * torch.finfo(A_PI.dtype).eps * size
    return LayerProof(layer.name, A_PI.shape[0], error, largest, bound)


def _worst(so_far: float, difference: torch.Tensor) -> float:
    worst = float(difference.abs().max())
    # max() would drop a NaN.
    return worst if not worst <= so_far else so_far

"""An adapter that is built layer by layer, as a LoRA or as `spectral_a`, and then written as a PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from ..adapter import SpectralModule
from ..adapter.saved import LayerRanks, saved_method, tensors_by_layer
from ..algebra import dense
from ..checkpoint import PEFT_PREFIX, read_adapter_folder, save_tensors, write_atomically
from ..checkpoint.patterns import rank_pattern
from ..errors import ExportError, OptionError
from ..export.architecture import Place
from ..methods import build_method
from ..records import Weight
from ..spectrum import decompose
from .cut import Cut, best_factors
from .spectral_fit import fit_spectral_a

BaseMatrix = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """How close one layer of a draft is to dW."""

    rank: int
    best: float
    """|dW - update|_F, as a fraction of |dW|_F."""
    rounding: float
    """How much rounding and writing can add to that; a larger error is refused."""


class Draft(Protocol):
    """What both forms of an adapter have in common."""

    form: ClassVar[str]
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, int]

    def add(self, place: Place, kernel: tuple[int, ...], W_OI: torch.Tensor, dW_OI: torch.Tensor) -> Fit:
        """Add one layer; `kernel` is the shape of its tensor."""

    def config(self) -> dict[str, Any]:
        """Get the fields of adapter_config.json that belong to this form."""

    def updates(self, folder: Path, base_matrix: BaseMatrix) -> Iterator[tuple[str, torch.Tensor]]:
        """Read (layer, dW_OI) again from the written folder, one at a time; the base gives W_OI by layer."""


def write_draft(draft: Draft, folder: Path, carried: Mapping[str, torch.Tensor], shared: Mapping[str, Any]) -> None:
    """Write tensors and config into an existing folder."""
    config = {**draft.config(), **shared, "inference_mode": True}
    save_tensors(folder / "adapter_model.safetensors", {**draft.tensors, **carried})
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


@dataclass
class LoraDraft:
    """dW_OI ~ B_OP A_PI, scaling 1."""

    cut: Cut
    dtype: torch.dtype
    form: ClassVar[str] = "lora"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Layer -> the names of its B and its A in the file."""
    transposed: bool = False

    def add(self, place: Place, kernel: tuple[int, ...], W_OI: torch.Tensor, dW_OI: torch.Tensor) -> Fit:
        best = best_factors(Weight(place.module, dW_OI), self.cut)
        rank = len(best.A_PI)
        B, A = best.B_OP.to(self.dtype), best.A_PI.to(self.dtype)
        if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
            raise ExportError(f"{place.module}: the factors are too large for {self.dtype}. Choose dtype float32.")
        if place.kind == "embedding":
            names = ("lora_embedding_B", "lora_embedding_A")
        else:
            names = ("lora_B.weight", "lora_A.weight")
            self.transposed |= place.transposed
        if place.kind == "convolution":
            B, A = B.reshape(*B.shape, *(1 for _ in kernel[2:])), A.reshape(rank, *kernel[1:])
        B_name, A_name = self.names[place.module] = tuple(f"{PEFT_PREFIX}{place.module}.{name}" for name in names)
        self.tensors |= {B_name: B, A_name: A}
        self.ranks[place.module] = rank
        # Rounding b and a changes b a by at most eps |b||a|, so |B A|_F by at most eps |B|_F |A|_F = eps |B|_F^2.
        size = float(torch.linalg.vector_norm(best.B_OP)) ** 2 / float(torch.linalg.vector_norm(dW_OI))
        return Fit(rank, best.lost, torch.finfo(self.dtype).eps * size + 1e-5)  # float32 sums of one layer: ~1e-6

    def config(self) -> dict[str, Any]:
        r, pattern = rank_pattern(self.ranks)
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": r,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "fan_in_fan_out": self.transposed,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
        }

    def updates(self, folder: Path, base_matrix: BaseMatrix) -> Iterator[tuple[str, torch.Tensor]]:
        # Not by `read_lora`, which refuses the biases that --save-rest puts beside the factors.
        lora = read_adapter_folder(folder).require("LORA")
        for layer, (B_name, A_name) in self.names.items():
            yield layer, lora.tensor(B_name).float().flatten(1) @ lora.tensor(A_name).float().flatten(1)


@dataclass
class SpectralDraft:
    """dW_OI ~ [A_U, U] diag(S, S) [Vh + A_Vh ; A_Vh] in the singular directions of the base weight."""

    r: int
    columns: Any = "top"
    form: ClassVar[str] = "spectral_a"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, place: Place, kernel: tuple[int, ...], W_OI: torch.Tensor, dW_OI: torch.Tensor) -> Fit:
        asked = build_method(self.form, {"r": self.r, "columns": self.columns})
        method = asked.fitted(W_OI.shape[0], W_OI.shape[1], place.module)
        r, columns = method.basis(*W_OI.shape)
        spectrum = decompose(Weight(place.module, W_OI), r, columns=columns)
        method.check(spectrum)
        module = SpectralModule(method, spectrum, embed_basis=not spectrum.is_found_again)
        names = method.trained_shapes(*W_OI.shape)  # what is added to U, then what is added to Vh
        numbers = dict(zip(names, fit_spectral_a(Weight(place.module, dW_OI), spectrum), strict=True))
        for name, number in numbers.items():
            getattr(module, name).data.copy_(number)
        stem = f"{PEFT_PREFIX}{place.module}.spectune_adapter."
        self.tensors |= {stem + name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.ranks[place.module] = r
        missed = torch.linalg.vector_norm(dW_OI - dense(module.delta())) / torch.linalg.vector_norm(dW_OI)
        # Rotating the basis to its sketch on load costs up to 6e-5 of an update (docs/portability.md), of a W that
        # dW is a small part of more; a thousandth is still no loss to speak of. Chosen.
        return Fit(r, float(missed), 1e-3)

    def config(self) -> dict[str, Any]:
        listed = isinstance(self.columns, tuple)  # then every layer takes those of the list that it has
        if listed and self.ranks and max(self.ranks.values()) < len(self.columns):
            raise OptionError(
                f"columns={list(self.columns)}: no changed weight has all of these. Take some off the list."
            )
        r, pattern = (self.r, {}) if listed else rank_pattern(self.ranks)
        return {
            "peft_type": "SPECTUNE",
            "method": self.form,
            "r": r,
            "columns": list(self.columns) if listed else self.columns,
            "rank_pattern": pattern,
            "format_version": 1,
        }

    def updates(self, folder: Path, base_matrix: BaseMatrix) -> Iterator[tuple[str, torch.Tensor]]:
        saved = read_adapter_folder(folder).require("SPECTUNE")
        ranks, layers = LayerRanks.of_config(saved.config), tensors_by_layer(saved)
        for layer in self.ranks:
            tensors = {name: saved.tensor(key) for name, key in layers[layer].items()}
            W_OI = base_matrix(layer)
            method = saved_method(saved.config, layer, ranks, (W_OI.shape[0], W_OI.shape[1]))
            rank, columns = method.basis(*W_OI.shape)
            spectrum = decompose(Weight(layer, W_OI), rank, columns=columns)
            module = SpectralModule(method, spectrum, embed_basis="U_OR" in tensors)
            module.load_state_dict(tensors)  # rotates the basis to match the sketch, as any loading does
            yield layer, dense(module.delta()).detach()

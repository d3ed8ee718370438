"""`DataSpectra`: the directions that data chose for the layers of a model, in memory and as one basis file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import BASIS_KIND, PEFT_PREFIX, TensorFile, basis_identity, basis_name, open_basis, save_tensors
from ..errors import AdapterError
from ..records import Quality, Spectrum

FACTORS = ("U_OR", "S_R", "Vh_RI")
STEM = "{}{}.spectune_adapter.{}"
# |U^T U - I| of directions that are rounded to bfloat16 is 2^-8 at most (one column of one entry). Chosen above it.
UNORTHOGONAL = 0.02
# |u^T W v - S|, root mean square over directions of data, as a fraction of W's root mean square entry: rounding the
# base to bfloat16 gives at most 2^-9, another weight about 1. In between, chosen.
FOREIGN_GAIN = 0.1


class DataSpectra(Mapping[str, Spectrum]):
    """Layer -> its directions, as `spectune.prepare` found them in the data; copies of a config share them.

    U and Vh are rounded to bfloat16 when they are found, before anything is trained in them. So a file keeps them
    exactly in half the bytes, and what was trained in them loses nothing.
    """

    def __init__(self, directions: str, spectra: Mapping[str, Spectrum], batches: int) -> None:
        self.directions, self.batches = directions, batches
        self.said = f"found in {batches} batches"
        """Where they come from, for the report of a run."""
        of_data = directions != "weight"  # else places, chosen by data among the weight's own directions
        self._spectra = {layer: _rounded(found) if of_data else found for layer, found in spectra.items()}

    def __getitem__(self, layer: str) -> Spectrum:
        return self._spectra[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def __deepcopy__(self, memo: Any) -> DataSpectra:
        return self

    def __repr__(self) -> str:
        return f"DataSpectra({self.directions!r}, {len(self)} layers, {self.batches} batches)"

    @cached_property
    def identity(self) -> str:
        """64 hex digits, equal for equal directions of equal layers."""
        return basis_identity(self.tensors)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the basis file: those that an adapter's own file would have, in bfloat16."""
        return {
            STEM.format(PEFT_PREFIX, layer, name): getattr(found, name).to(
                torch.float32 if name == "S_R" else torch.bfloat16
            )
            for layer, found in self.items()
            for name in FACTORS
        }

    def save(self, path: str | Path) -> Path:
        """Write the basis file, whole or not at all, and get its path.

        A path that ends in .safetensors is the file; any other is a folder, and the file gets its own name in it.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / basis_name(self.identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        residuals = {layer: found.quality.residual for layer, found in self.items()}
        noted = {"kind": BASIS_KIND, "directions": self.directions, "batches": str(self.batches)}
        save_tensors(path, self.tensors, noted | {"residuals": json.dumps(residuals)})
        return path

    @classmethod
    def read(cls, file: str | Path | TensorFile) -> DataSpectra:
        """Get the directions of a basis file; `AdapterError` for any other file, and for a damaged one."""
        file = file if isinstance(file, TensorFile) else open_basis(file)
        try:
            directions, residuals = file.metadata["directions"], json.loads(file.metadata["residuals"])
            spectra = {layer: _read(file, layer, float(kept), directions) for layer, kept in residuals.items()}
            found = cls(directions, spectra, int(file.metadata["batches"]))
            if directions == "weight" or found.tensors.keys() != file.shapes.keys():
                raise ValueError("its tensors and what it says of them differ")
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{file.path}: the basis file is damaged: {error}. Copy it again.") from error
        return found


def gain_off(W_OI: torch.Tensor, found: Spectrum) -> float:
    """Get how far what W has along directions of data is from S, as a fraction of a typical entry of W."""
    gains_R = (found.U_OR * (W_OI @ found.Vh_RI.mT)).sum(0)
    off = torch.linalg.vector_norm(gains_R - found.S_R) / max(len(gains_R), 1) ** 0.5
    return float(off) / (float(torch.linalg.vector_norm(W_OI)) / W_OI.numel() ** 0.5 or 1.0)


def _rounded(found: Spectrum) -> Spectrum:
    U_OR, Vh_RI = (t.to(torch.bfloat16).float() for t in (found.U_OR, found.Vh_RI))
    return replace(found, U_OR=U_OR, S_R=found.S_R.float(), Vh_RI=Vh_RI)


def _read(file: TensorFile, layer: str, residual: float, directions: str) -> Spectrum:
    U_OR, S_R, Vh_RI = (file.tensor(STEM.format(PEFT_PREFIX, layer, name)).float() for name in FACTORS)
    if U_OR.ndim != 2 or Vh_RI.ndim != 2 or not U_OR.shape[1:] == S_R.shape == Vh_RI.shape[:1] or not len(S_R):
        raise ValueError(f"the tensors of {layer} do not match each other")
    off = max(unorthogonal(U_OR), unorthogonal(Vh_RI.mT))
    if not off <= UNORTHOGONAL or not bool(torch.isfinite(S_R).all()) or not math.isfinite(residual):
        raise ValueError(f"the directions of {layer} are not orthonormal numbers")
    quality = Quality(directions, residual, off, 0.0)
    return Spectrum(U_OR, S_R, Vh_RI, tuple(range(len(S_R))), quality, layer, directions)


def unorthogonal(Q_AR: torch.Tensor) -> float:
    """Get the largest entry of |Q^T Q - I|."""
    return float((Q_AR.mT @ Q_AR - torch.eye(Q_AR.shape[1], dtype=Q_AR.dtype, device=Q_AR.device)).abs().max())

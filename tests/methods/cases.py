"""The methods under contract: one line here for every option that changes the form of an update."""

from __future__ import annotations

from typing import Any

import torch

from spectune.records import Weight

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "spectral_a": ("spectral_a", {"r": 3}),
    "spectral_a-bottom": ("spectral_a", {"r": 2, "columns": "bottom"}),
    "spectral_a-start": ("spectral_a", {"r": 2, "columns": 3}),
    "spectral_a-list": ("spectral_a", {"r": 2, "columns": (0, 4)}),
    "spectral_a-shifted": ("spectral_a", {"r": 2, "train_singular_values": True}),
    "svft-plain": ("svft", {}),
    "svft-plain-truncated": ("svft", {"basis_rank": 4}),
    "svft-banded": ("svft", {"pattern": "banded", "off_diagonals": 1}),
    "svft-random": ("svft", {"pattern": "random", "off_diagonals": 2}),
    "svft-top_k": ("svft", {"pattern": "top_k", "off_diagonals": 1}),
    "svft-chosen": ("svft", {"pattern": "chosen", "places": 11}),
    "svft-chosen-truncated": ("svft", {"pattern": "chosen", "basis_rank": 5, "off_diagonals": 1, "gate": True}),
    "svft-dense": ("svft", {"pattern": "dense", "basis_rank": 4}),
    "svft-dense-rectangular": ("svft", {"pattern": "dense", "core": (3, 5)}),
    "svft-dense-full": ("svft", {"pattern": "dense", "full_basis": True}),
    "svft-dense-gate": ("svft", {"pattern": "dense", "core": (5, 3), "gate": True}),
    "svft-banded-full": ("svft", {"pattern": "banded", "off_diagonals": 2, "full_basis": True}),
    "svft-random-full": ("svft", {"pattern": "random", "off_diagonals": 2, "full_basis": True}),
    "spectral_r": ("spectral_r", {"r": 4}),
    "spectral_r-scaled": ("spectral_r", {"r": 3, "train_singular_values": True}),
    "specadapt": ("specadapt", {"r": 2}),
    "specadapt-own": ("specadapt", {"r": 2, "basis_rank": 4, "shared_core": False}),
    "one_sided": ("one_sided", {"r": 3}),
    "one_sided-left": ("one_sided", {"r": 3, "side": "left"}),
    "one_sided-shared": ("one_sided", {"r": 3, "share": "kind"}),
    "spectral_r-shared": ("spectral_r", {"r": 3, "share": "kind"}),
    "svft-dense-shared": ("svft", {"pattern": "dense", "core": (3, 4), "share": "kind"}),
    "svdiff-shared": ("svdiff", {"basis_rank": 3, "share": "kind"}),
    "svdiff": ("svdiff", {}),
    "svdiff-truncated": ("svdiff", {"basis_rank": 3}),
    "lidb": ("lidb", {"r": 2, "output_width": 5, "input_width": 6}),
    "orthogonal_adaptation": ("orthogonal_adaptation", {"r": 2, "concept": 1}),
    "svft-gate": ("svft", {"pattern": "banded", "gate": True}),
}


def weight_for(case: str) -> Weight:
    """A 9x7 weight, or a square one where the pattern asks for it, in float64."""
    shape = (8, 8) if case == "svft-top_k" else (9, 7)
    generator = torch.Generator().manual_seed(1)
    return Weight("layer", torch.randn(shape, generator=generator, dtype=torch.float64))

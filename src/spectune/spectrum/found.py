"""What a solver returns to the engine, before signs are fixed and the quality is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Found:
    """The chosen directions, and the singular values that the solver found around them."""

    U_OR: torch.Tensor
    S_R: torch.Tensor
    Vh_RI: torch.Tensor
    values_J: torch.Tensor
    """The J >= R leading singular values that the solver knows, descending, on the CPU in float64:
    all K for a direct solver, one more than needed for `randomized`."""
    solver: str
    steps: int = 0
    converged: bool = True


def transposed(found: Found) -> Found:
    """Get the answer for W from the answer for W^T."""
    return Found(found.Vh_RI.mT, found.S_R, found.U_OR.mT, found.values_J, found.solver, found.steps, found.converged)

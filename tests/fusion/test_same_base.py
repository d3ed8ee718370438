"""What two embedded bases tell about the weights that they come from."""

from __future__ import annotations

import torch

from spectune.fusion.same_base import MOST_FOREIGN, foreign_share
from spectune.records import Spectrum, Weight
from spectune.spectrum import decompose


def falling(seed: int, O: int = 96, I: int = 64) -> torch.Tensor:
    """A weight whose singular values fall as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(side, I, generator=generator))[0] for side in (O, I))
    return U * torch.arange(1, I + 1) ** -0.7 @ V.T


def basis(W_OI: torch.Tensor, columns: list[int]) -> Spectrum:
    return decompose(Weight("layer", W_OI), len(columns), columns=columns, solver="exact")


def test_columns_of_one_weight_fit() -> None:
    W_OI = falling(0)
    assert foreign_share(basis(W_OI, [0, 1, 2]), basis(W_OI, [5, 3, 9])) < 1e-3
    assert foreign_share(basis(W_OI, [0, 1, 2]), basis(W_OI, [2, 1, 7])) < 1e-3


def test_a_rounded_copy_fits_and_another_weight_does_not() -> None:
    W_OI = falling(0)
    one, rounded, other = basis(W_OI, [0, 1, 2, 3]), W_OI.bfloat16().float(), falling(1)
    for columns in ([4, 5, 6, 7], [0, 1, 2, 3], [2, 3, 4, 5]):
        assert foreign_share(one, basis(rounded, columns)) < MOST_FOREIGN / 3
        assert foreign_share(one, basis(other, columns)) > 2 * MOST_FOREIGN


def test_a_turn_inside_the_shared_columns_is_not_another_base() -> None:
    one = basis(falling(0), [0, 1, 2])
    Q_RR = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    turned = Spectrum(one.U_OR @ Q_RR, one.S_R, Q_RR.T @ one.Vh_RI, one.columns, one.quality)
    assert foreign_share(one, turned) < 1e-3

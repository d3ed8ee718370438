"""What the records say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectune.records import Quality, Spectrum

GOOD = Quality(solver="exact", residual=1e-7, orthogonality=1e-7, gap=0.1)


@pytest.mark.parametrize(
    ("columns", "gap", "again"),
    [
        ((0, 1), 0.1, True),
        ((0, 1), float("inf"), True),
        ((0, 1), 1e-7, False),  # another solver may find other directions
        ((0, 1), float("nan"), False),
        ((1, 2), 0.1, False),  # rounding the base mixes in the ones above
        ((1, 0), 0.1, False),
    ],
)
def test_only_leading_directions_above_a_gap_are_found_again(columns: tuple[int, int], gap: float, again: bool) -> None:
    spectrum = Spectrum(torch.eye(4)[:, :2], torch.ones(2), torch.eye(5)[:2], columns, replace(GOOD, gap=gap))
    assert spectrum.is_found_again is again

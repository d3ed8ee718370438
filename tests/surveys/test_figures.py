"""The figures of a spectrum, against closed forms and torch's own SVD."""

from __future__ import annotations

import math

import pytest
import torch

from spectune.errors import WeightError
from spectune.surveys.figures import (
    effective_rank,
    energy_at,
    frobenius,
    median,
    rank_for_energy,
    stable_rank,
    weight_singular_values,
)


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (2100, 5), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = torch.tensor(weight_singular_values(W_OI), dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.svdvals(W_OI.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.tensor([[1.0, math.nan], [0, 1]]), "layers.0: .*NaN or infinity"),
        (torch.ones(2, 2, dtype=torch.int8), "this is 2x2 of torch.int8"),
        (torch.ones(2, 2, 2), "this is 2x2x2"),
        (torch.ones(0, 3), "this is 0x3"),
    ],
)
def test_what_has_no_singular_values_is_named(weight: torch.Tensor, said: str) -> None:
    with pytest.raises(WeightError, match=said):
        weight_singular_values(weight, "layers.0")


def test_effective_rank_is_the_count_of_equal_values_and_ignores_zeros() -> None:
    assert effective_rank([3.0] * 5 + [0.0]) == pytest.approx(5)
    # exp(H) of (2/3, 1/3), by hand: 3 / 4^(1/3).
    assert effective_rank([2.0, 1.0]) == pytest.approx(3 / 4 ** (1 / 3))
    assert effective_rank([0.0, 0.0]) == effective_rank([]) == 0


def test_stable_rank_and_energy_count_squares() -> None:
    values = [4.0, 2.0, 2.0, 1.0]
    assert frobenius(values) == 5.0
    assert stable_rank(values) == pytest.approx(25 / 16)
    assert energy_at(values, 1) == pytest.approx(16 / 25) and energy_at(values, 9) == 1
    assert [rank_for_energy(values, share) for share in (0.64, 0.65, 0.8, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    assert stable_rank([0.0]) == energy_at([0.0], 1) == rank_for_energy([0.0], 0.9) == 0


def test_median_takes_the_middle() -> None:
    assert median([3, 1, 2]) == 2 and median([4, 1, 2, 3]) == 2.5 and math.isnan(median([]))

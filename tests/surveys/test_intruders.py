"""Overlaps and intruder dimensions, against dense matrices and planted directions."""

from __future__ import annotations

import pytest
import torch

from spectune import decompose
from spectune.algebra import dense
from spectune.records import Delta
from spectune.surveys.intruders import INTRUDER_EPSILON, INTRUDER_K, intruders, overlap


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(O: int, I: int) -> torch.Tensor:
    """A weight with well separated singular values."""
    K = min(O, I)
    U_OK, V_IK = torch.linalg.qr(gaussian(O, K, seed=1)).Q, torch.linalg.qr(gaussian(I, K, seed=2)).Q
    return (U_OK * torch.linspace(3, 0.5, K, dtype=torch.float64)) @ V_IK.T


@pytest.mark.parametrize(("O", "I"), [(30, 20), (20, 30)])
def test_overlap_is_the_energy_inside_each_space(O: int, I: int) -> None:
    W_OI = weight(O, I)
    spectrum = decompose(W_OI, dtype=torch.float64)
    delta = Delta(gaussian(O, 3), gaussian(3, 4, seed=5), gaussian(4, I, seed=6))
    found, dW_OI = overlap(delta, spectrum, 5), dense(delta)
    total = dW_OI.square().sum()
    U_OK, _, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False)
    assert found.left_top == pytest.approx(float((U_OK[:, :5].T @ dW_OI).square().sum() / total))
    assert found.left_bottom == pytest.approx(float((U_OK[:, -5:].T @ dW_OI).square().sum() / total))
    assert found.right_top == pytest.approx(float((dW_OI @ Vh_KI[:5].T).square().sum() / total))
    assert found.right_bottom == pytest.approx(float((dW_OI @ Vh_KI[-5:].T).square().sum() / total))
    assert (found.left_chance, found.right_chance) == (5 / O, 5 / I)


def test_a_random_update_overlaps_by_chance() -> None:
    spectrum = decompose(weight(40, 30), dtype=torch.float64)
    shares = []
    for seed in range(60):
        found = overlap(
            Delta(gaussian(40, 2, seed=seed), torch.ones(2).double(), gaussian(2, 30, seed=99 + seed)), spectrum, 6
        )
        shares.append((found.left_top, found.right_top))
    left, right = torch.tensor(shares).mean(dim=0).tolist()
    # The spread of the mean of 60 such shares is about 0.01.
    assert left == pytest.approx(6 / 40, abs=0.03) and right == pytest.approx(6 / 30, abs=0.03)


def test_a_zero_update_has_no_overlap_and_no_intruders() -> None:
    W_OI = weight(20, 20)
    spectrum = decompose(W_OI, dtype=torch.float64)
    delta = Delta(torch.zeros(20, 2).double(), torch.ones(2).double(), gaussian(2, 20))
    assert overlap(delta, spectrum, 4).left_top == 0
    found = intruders(delta, W_OI, spectrum)
    assert (found.count, found.outside, found.looked_at) == (0, 0, INTRUDER_K)
    assert found.least_cosine == pytest.approx(1, abs=1e-4)


def test_a_planted_direction_is_an_intruder_by_the_papers_algorithm() -> None:
    W_OI = weight(60, 50)
    spectrum = decompose(W_OI, dtype=torch.float64)
    delta = Delta(gaussian(60, 1, seed=3), torch.tensor([0.3]).double(), gaussian(1, 50, seed=4))
    found = intruders(delta, W_OI, spectrum)
    # The paper's loops, over torch's own SVDs.
    U_base, U_tuned = (torch.linalg.svd(W, full_matrices=False).U for W in (W_OI, W_OI + dense(delta)))
    expected = sum(
        all(abs(float(U_base[:, i] @ U_tuned[:, j])) < INTRUDER_EPSILON for i in range(50)) for j in range(INTRUDER_K)
    )
    assert found.count == expected >= 1 and found.outside >= 1 and found.least_cosine < INTRUDER_EPSILON


def test_a_turn_of_the_top_directions_is_an_intruder_but_not_a_new_one() -> None:
    W_OI = weight(40, 40)
    spectrum = decompose(W_OI, dtype=torch.float64)
    # Hadamard's matrix: every turned direction has the cosine 1 / sqrt(8) with each of the eight.
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turn_RR = torch.kron(torch.kron(two, two), two) / 8**0.5
    core_RR = turn_RR @ torch.diag(spectrum.S_R[:8]) - torch.diag(spectrum.S_R[:8])
    found = intruders(Delta(spectrum.U_OR[:, :8], core_RR, spectrum.Vh_RI[:8]), W_OI, spectrum)
    assert (found.count, found.outside) == (8, 0) and found.least_cosine == pytest.approx(8**-0.5)


def test_a_small_weight_is_looked_at_whole() -> None:
    W_OI = weight(6, 4)
    delta = Delta(gaussian(6, 1), torch.ones(1).double(), gaussian(1, 4, seed=1))
    assert intruders(delta, W_OI, decompose(W_OI, dtype=torch.float64)).looked_at == 4

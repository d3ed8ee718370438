from __future__ import annotations

import pytest
import torch

import spectune.spectrum.exact as subject
from spectune.spectrum.columns import choose
from spectune.spectrum.exact import exact, gram

from .weights import power_law, with_values

DIRECT = {"exact": exact, "gram": gram}
# Roundoff of float32 is 6e-8; LAPACK's float32 SVD loses some tens of it.
FLOAT32 = 5e-6


def find(solver, W_OI, columns="top", rank=None):
    return solver(W_OI, choose(columns, rank, min(W_OI.shape)), tolerance=1e-4, seed=0)


def orthogonality(found):
    eye_RR = torch.eye(len(found.S_R), dtype=found.S_R.dtype)
    left, right = found.U_OR.mT @ found.U_OR - eye_RR, found.Vh_RI @ found.Vh_RI.mT - eye_RR
    return float(max(left.abs().max(), right.abs().max()))


@pytest.mark.parametrize("solver", DIRECT.values(), ids=DIRECT)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_a_direct_solver_rebuilds_the_weight(solver, shape):
    W_OI = power_law(*shape)
    found = find(solver, W_OI)
    torch.testing.assert_close((found.U_OR * found.S_R) @ found.Vh_RI, W_OI, atol=FLOAT32, rtol=0)
    torch.testing.assert_close(found.values_J, torch.linalg.svdvals(W_OI.double()), atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("solver", DIRECT.values(), ids=DIRECT)
@pytest.mark.parametrize(
    "W_OI",
    [
        torch.zeros(30, 20),
        torch.ones(20, 30),
        torch.eye(25),
        with_values(40, 30, torch.tensor([1.0, 0.5, 0.25])),
        with_values(40, 30, torch.logspace(0, -12, 30, dtype=torch.float64)),
    ],
    ids=["zero", "rank one", "identity", "rank three", "twelve decades"],
)
def test_both_sides_stay_orthonormal_whatever_the_rank(solver, W_OI):
    found = find(solver, W_OI)
    assert orthogonality(found) < FLOAT32
    assert torch.isfinite(found.values_J).all()
    torch.testing.assert_close((found.U_OR * found.S_R) @ found.Vh_RI, W_OI, atol=FLOAT32, rtol=0)


def test_gram_is_more_accurate_than_float32_although_it_squares():
    W_OI = with_values(60, 40, torch.logspace(0, -6, 40, dtype=torch.float64))
    S_K = torch.linalg.svdvals(W_OI.double())
    assert float((find(gram, W_OI).S_R - S_K).abs().max()) < 6e-8


def test_gram_in_float64_keeps_orthogonality_of_float64():
    # 3e-4 of the largest value: above DIVIDE_ABOVE, where dividing would leave an error of 1e-9.
    W_OI = with_values(60, 40, torch.logspace(0, -3.5, 40, dtype=torch.float64)).double()
    assert orthogonality(find(gram, W_OI)) < 1e-13


def test_only_the_chosen_places_come_back_in_their_order():
    W_OI = power_law(30, 20)
    S_K = torch.linalg.svdvals(W_OI.double())
    for solver in DIRECT.values():
        found = find(solver, W_OI, [7, 2, 19])
        torch.testing.assert_close(found.S_R.double(), S_K[[7, 2, 19]], atol=FLOAT32, rtol=0)
        assert found.U_OR.shape == (30, 3) and found.Vh_RI.shape == (3, 20)


def test_gram_gives_weak_directions_back_in_the_order_asked_for():
    W_OI = with_values(60, 40, torch.logspace(0, -6, 40, dtype=torch.float64))
    S_K = torch.linalg.svdvals(W_OI.double())
    found = find(gram, W_OI, [35, 2, 39])  # 39 is so weak that U comes from the QR, in descending order
    torch.testing.assert_close(found.S_R.double(), S_K[[35, 2, 39]], atol=1e-9, rtol=1e-2)
    torch.testing.assert_close(W_OI @ found.Vh_RI.mT, found.U_OR * found.S_R, atol=3e-7, rtol=0)


def test_exact_falls_back_to_a_second_driver(monkeypatch):
    svd, calls = torch.linalg.svd, []

    def failing(W_OI, **options):
        calls.append(W_OI.dtype)
        if W_OI.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(W_OI, **options)

    monkeypatch.setattr(subject.torch.linalg, "svd", failing)
    W_OI = power_law(12, 9)
    found = find(exact, W_OI)
    assert calls == [torch.float32, torch.float64]
    assert found.S_R.dtype == torch.float32
    torch.testing.assert_close((found.U_OR * found.S_R) @ found.Vh_RI, W_OI)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (48, 48)])
def test_a_few_eigenvectors_alone_are_those_of_the_whole_problem(shape):
    W_OI = power_law(*shape)
    few, all_of_them = choose("top", 5, min(shape)), choose("top", 30, min(shape))
    found = gram(W_OI, few, tolerance=1e-4, seed=0)
    whole = gram(W_OI, all_of_them, tolerance=1e-4, seed=0)
    assert len(found.values_J) == 6 and len(whole.values_J) == min(shape)
    torch.testing.assert_close(found.values_J, whole.values_J[:6])
    torch.testing.assert_close(
        found.U_OR * found.S_R @ found.Vh_RI, whole.U_OR[:, :5] * whole.S_R[:5] @ whole.Vh_RI[:5], atol=1e-5, rtol=0
    )

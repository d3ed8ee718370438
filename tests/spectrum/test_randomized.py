from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import spectune.spectrum.engine as engine
import spectune.spectrum.randomized as subject
from spectune import spectrum as room
from spectune.records import Weight
from spectune.spectrum.columns import choose
from spectune.spectrum.orthonormal_rows import OrthonormalRows, gaussian
from spectune.spectrum.randomized import randomized_batch
from spectune.spectrum.ritz import Ritz

from .weights import largest_angle, power_law, with_values, worst_value

# Roundoff of float32 through the recurrences; the solver itself stops at 8 units of 1.2e-7.
FLOAT32 = 5e-6


def decompose(W_OI, rank, **options):
    return room.decompose(W_OI, rank, solver="randomized", **options)


STEPS = torch.arange(1, 301, dtype=torch.float64)
SPECTRA = {
    "power law": STEPS**-0.7,
    "exponential": 0.97**STEPS,
    "flat": torch.linspace(1, 0, 300, dtype=torch.float64),
    "tight gap at the cut": torch.cat([STEPS[:8] ** -0.5, 8**-0.5 * (1 - 1e-3 * STEPS[:12]), 0.3 / STEPS[:280]]),
}


@pytest.mark.parametrize("S_K", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(300, 300), (300, 400), (400, 300)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_subspace_is_within_the_tolerance(S_K, shape, tolerance):
    W_OI = with_values(*shape, S_K)
    found = decompose(W_OI, 8, tolerance=tolerance)
    assert found.quality.converged
    assert largest_angle(W_OI, found) <= tolerance
    assert worst_value(W_OI, found) <= max(tolerance**2, FLOAT32)


def test_float64_reaches_angles_that_float32_cannot():
    W_OI = power_law(200, 150)
    found = decompose(W_OI, 6, tolerance=1e-10, dtype=torch.float64)
    assert found.quality.converged and largest_angle(W_OI, found) <= 1e-10


@pytest.mark.parametrize(
    "W_OI",
    [
        torch.zeros(60, 40),
        torch.ones(100, 120),
        torch.eye(64),
        torch.diag(torch.cat([torch.ones(30), torch.linspace(0.9, 0.1, 100)])),
        with_values(90, 70, torch.tensor([3.0, 2.0, 1.0])),
        torch.randn(1, 30, generator=torch.Generator().manual_seed(0)),
        torch.randn(30, 1, generator=torch.Generator().manual_seed(0)),
        torch.randn(500, 9, generator=torch.Generator().manual_seed(0)),
        torch.eye(40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
        * torch.tensor([1.0, 0.0]).repeat(20),
    ],
    ids=["zero", "ones", "identity", "repeated", "rank 3", "1xN", "Nx1", "thin", "half a permutation"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_degenerate_weight_is_solved_to_roundoff(W_OI, dtype):
    found = decompose(W_OI, min(8, *W_OI.shape), dtype=dtype)
    # A residual adds the roundoff of 8 directions in 130 dimensions: half of FLOAT32 where nothing is fused.
    limit = 4 * FLOAT32 if dtype == torch.float32 else 1e-13
    assert found.quality.converged
    assert found.quality.residual < limit
    assert found.quality.orthogonality < limit
    assert worst_value(W_OI, found) < limit


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (33, 33)])
def test_all_directions_are_found_when_the_space_is_exhausted(shape):
    W_OI = power_law(*shape)
    found = decompose(W_OI, None)
    torch.testing.assert_close((found.U_OR * found.S_R) @ found.Vh_RI, W_OI, atol=FLOAT32, rtol=0)
    assert found.quality.gap == math.inf


def test_a_space_that_the_block_does_not_divide_is_completed():
    # 40 directions, blocks of 16: the last block has 8 rows. The tolerance cannot be met before.
    W_OI = with_values(60, 40, torch.linspace(1, 0.99, 40, dtype=torch.float64))
    found = decompose(W_OI, 10, tolerance=1e-12, dtype=torch.float64)
    assert found.quality.converged and found.quality.steps == 3
    assert largest_angle(W_OI, found) < 1e-9


def test_the_angle_bound_is_the_least_over_the_splits_and_distrusts_unfinished_values():
    empty = torch.empty(0)
    values_k, residuals_k = (torch.tensor(row, dtype=torch.float64) for row in ([4, 3, 2.9, 1], [0, 1e-3, 2e-3, 0.1]))
    ritz = Ritz(values_k, empty, residuals_k, count=2, whole=False)
    # Wedin, m = 2: c = 2.902, 3 * 1e-3 / (9 - c^2) = 5.2e-3; m = 3: c = 1.1, 3 * 1e-3 / (9 - c^2) * (1 + 2e-3 / 0.1).
    assert ritz.angle_bound() == pytest.approx(3e-3 / (9 - 1.1**2) * 1.02, rel=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_what_is_certified_is_true(decay, tolerance):
    W_OI = power_law(240, 200, decay) if decay else torch.randn(240, 200, generator=torch.Generator().manual_seed(3))
    found = decompose(W_OI, 6, tolerance=tolerance)
    assert found.quality.converged
    assert largest_angle(W_OI, found) <= tolerance


def test_weights_solved_together_are_the_weights_solved_alone():
    # One decays fast, one slowly, one has rank 2: they are done at different steps, and one needs rows of its own.
    thin = power_law(120, 2, 0.5) @ power_law(2, 90, 0.5)
    weights = [power_law(120, 90, 2.0), power_law(120, 90, 0.3), thin]
    choice = choose("top", 5, 90)
    together = randomized_batch(torch.stack(weights), choice, tolerance=1e-4, seed=0)
    assert len({one.steps for one in together}) > 1
    for W_OI, one in zip(weights, together, strict=True):
        (alone,) = randomized_batch(W_OI[None], choice, tolerance=1e-4, seed=0)
        assert (alone.steps, alone.converged) == (one.steps, True)
        torch.testing.assert_close(
            one.U_OR * one.S_R @ one.Vh_RI, alone.U_OR * alone.S_R @ alone.Vh_RI, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(one.U_OR.mT @ one.U_OR, torch.eye(5), atol=1e-5, rtol=0)


def test_weights_are_batched_by_shape_and_come_back_in_their_order():
    weights = [Weight(f"w{i}", power_law(*shape)) for i, shape in enumerate([(60, 50), (50, 60), (60, 50)])]
    names = []
    spectra = room.decompose_many(weights, room.Request(rank=3), lambda weight: names.append(weight.name))
    assert [found.name for found in spectra] == ["w0", "w1", "w2"] and names == ["w0", "w2", "w1"]
    for weight, found in zip(weights, spectra, strict=True):
        torch.testing.assert_close(found.S_R, room.decompose(weight, 3).S_R)


def test_a_batch_stays_within_its_bytes(monkeypatch):
    monkeypatch.setattr(engine, "BATCH_BYTES", 2 * 60 * 50 * 4)
    assert list(engine.batches([(60, 50)] * 5 + [(900, 900)], torch.float32)) == [[0, 1], [2, 3], [4], [5]]


def test_giving_up_warns_with_name_residual_and_gap(monkeypatch):
    monkeypatch.setattr(subject, "MAX_STEPS", 2)
    with pytest.warns(UserWarning, match=r"weight: randomized did not converge in 2 steps: residual .* gap ") as seen:
        found = decompose(power_law(300, 300, 0.2), 8)
    assert len(seen) == 1
    assert not found.quality.converged and found.quality.residual > 1e-4


def test_the_same_seed_gives_the_same_bits_and_the_global_state_is_untouched():
    W_OI = power_law(200, 150)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = (decompose(W_OI, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert torch.equal(one.U_OR, two.U_OR) and torch.equal(one.Vh_RI, two.Vh_RI)
    assert not torch.equal(one.U_OR, other.U_OR)


def test_the_start_block_is_the_same_for_ever():
    # Golden: numpy's RandomState(0).standard_normal(3), whose stream numpy froze.
    found = gaussian(0, 1, 3, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor([[1.764052345967664, 0.4001572083672233, 0.9787379841057392]], dtype=torch.float64)
    )


def test_a_basis_stays_orthonormal_when_a_block_brings_nothing_new():
    basis = OrthonormalRows(torch.empty(1), 40, seed=0)
    random = torch.Generator().manual_seed(0)
    first_bN = torch.randn(6, 40, generator=random)
    basis.extend(first_bN[None], torch.tensor([1e-6]))
    second_bA = torch.cat([first_bN[:3] * 2, torch.zeros(2, 40), torch.randn(1, 40, generator=random)])
    fresh_BbA, old_Bbk, new_Bbb = basis.extend(second_bA[None], torch.tensor([1e-6]))
    rows_kA = basis.rows_BkA[0]
    torch.testing.assert_close(rows_kA @ rows_kA.mT, torch.eye(12), atol=1e-5, rtol=0)
    torch.testing.assert_close((old_Bbk @ rows_kA[:6] + new_Bbb @ fresh_BbA)[0], second_bA, atol=1e-5, rtol=0)

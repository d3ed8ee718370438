from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spectune.errors import AdapterError
from spectune.spectrum import align, decompose, sketch, sketch_tolerance, sketch_width
from spectune.spectrum.prior import Prior

from .weights import with_values

RANKS = [8, 32, 96]


def clustered(O: int = 128, I: int = 96) -> torch.Tensor:
    """A weight whose spectrum has three clusters, tighter than bfloat16's rounding, between spread values."""
    wide = torch.linspace(1, 0.05, I, dtype=torch.float64)
    for start, size in ((3, 3), (20, 6), (60, 4)):
        wide[start : start + size] = wide[start] - 1e-5 * torch.arange(size)
    return with_values(O, I, wide, seed=1)


def perturbed(W_OI, share, seed=0):
    noise_OI = torch.randn(W_OI.shape, generator=torch.Generator().manual_seed(seed))
    return W_OI + share * W_OI.norm() / noise_OI.norm() * noise_OI


def flipped(spectrum):
    signs_R = torch.ones(len(spectrum.S_R))
    signs_R[::2] = -1
    return replace(spectrum, U_OR=spectrum.U_OR * signs_R, Vh_RI=spectrum.Vh_RI * signs_R[:, None])


def update_errors(trained, loaded):
    """Get the relative errors of U C Vh with a random dense C, and of A_U S Vh + U S A_Vh with random A."""
    random = torch.Generator().manual_seed(0)
    O, I, R = trained.shape
    C_RR, A_OR, A_RI = (torch.randn(shape, generator=random) for shape in ((R, R), (O, R), (R, I)))
    S_R = trained.S_R

    def core(basis):
        return basis.U_OR @ C_RR @ basis.Vh_RI

    def additive(basis):
        return (A_OR * S_R) @ basis.Vh_RI + (basis.U_OR * S_R) @ A_RI

    return [float((f(loaded) - f(trained)).norm() / f(trained).norm()) for f in (core, additive)]


@pytest.mark.parametrize("R", RANKS)
def test_sign_flips_and_another_solver_change_the_update_by_less_than_a_thousandth(R):
    W_OI = clustered()
    trained = decompose(W_OI, R, solver="exact")
    stored = sketch(trained, sketch_width(R))
    loaded = flipped(decompose(W_OI, R, solver="gram"))
    assert max(update_errors(trained, loaded)) > 0.5
    turned, unexplained = align(loaded, stored)
    assert max(update_errors(trained, turned)) <= 1e-3
    assert unexplained <= 1e-3


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_copy_of_the_base_changes_the_update_by_less_than_a_hundredth(R, dtype):
    W_OI = clustered()
    trained = decompose(W_OI, R, solver="exact")
    loaded = decompose(W_OI.to(dtype), R, solver="gram")
    turned, unexplained = align(loaded, sketch(trained, sketch_width(R)))
    if R > 8:
        assert max(update_errors(trained, loaded)) > 0.1  # canonical signs alone do not settle clusters
    assert max(update_errors(trained, turned)) <= 1e-2
    assert unexplained <= sketch_tolerance(loaded)


@pytest.mark.parametrize("R", RANKS)
def test_another_base_is_refused_by_what_stays_unexplained(R):
    W_OI = clustered()
    stored = sketch(decompose(W_OI, R, solver="exact"), sketch_width(R))
    unexplained = {}
    for name, other_OI in {
        "bfloat16": W_OI.bfloat16(),
        "5%": perturbed(W_OI, 0.05),
        "foreign": perturbed(torch.zeros_like(W_OI) + 1e-9, 1e9),
    }.items():
        loaded = decompose(other_OI, R, solver="gram")
        unexplained[name] = align(loaded, stored)[1]
        assert (unexplained[name] > sketch_tolerance(loaded)) == (name != "bfloat16")
    assert 5 * unexplained["bfloat16"] < unexplained["5%"] < unexplained["foreign"]


@pytest.mark.parametrize("columns", ["top", "bottom", "random"])
def test_a_rounded_copy_is_never_refused_whatever_the_columns(columns):
    W_OI = clustered()
    trained = decompose(W_OI, 16, solver="exact", columns=columns)
    loaded = decompose(W_OI.bfloat16(), 16, solver="gram", columns=columns)
    assert align(loaded, sketch(trained, sketch_width(16)))[1] <= sketch_tolerance(loaded)


@pytest.mark.parametrize(
    ("gap", "allowed"),
    [
        (float("inf"), 0.01),
        # Entries of size |W|_F / sqrt(O I) = 2 / 4 change by 2^-9 / sqrt(3) of it: 5.64e-4. S[0] is 1, R is 4.
        (0.01, 0.01 + 3 * 5.638e-4 / 0.01 / 2),
        (1e-6, 0.35),
        (0.0, 0.35),
    ],
)
def test_the_tolerance_grows_as_the_gap_shrinks_up_to_a_ceiling(gap, allowed):
    found = decompose(torch.eye(4), None)
    found = replace(found, quality=replace(found.quality, gap=gap))
    assert sketch_tolerance(found) == pytest.approx(allowed, rel=1e-3)


@pytest.mark.parametrize("R", RANKS)
def test_turning_keeps_the_weight_and_the_orthonormality(R):
    W_OI = clustered()
    stored = sketch(decompose(W_OI, R, solver="exact"), sketch_width(R))
    loaded = flipped(decompose(W_OI.bfloat16(), R, solver="gram"))
    turned, _ = align(loaded, stored)
    assert torch.equal(turned.S_R, loaded.S_R) and turned.columns == loaded.columns
    before, after = ((s.U_OR * s.S_R) @ s.Vh_RI for s in (loaded, turned))
    # bfloat16 rounding itself moves W by about 1e-3 of its norm.
    assert float((after - before).norm() / before.norm()) < 1e-3
    for rows in (turned.U_OR.mT, turned.Vh_RI):
        torch.testing.assert_close(rows @ rows.mT, torch.eye(R), atol=1e-5, rtol=0)


def test_a_foreign_sketch_cannot_talk_far_apart_directions_into_each_other():
    W_OI = with_values(64, 48, torch.arange(48, 0, -1, dtype=torch.float64))
    loaded = decompose(W_OI, 8, solver="exact")
    stored = sketch(decompose(with_values(64, 48, torch.arange(48.0, 0, -1), seed=9), 8), sketch_width(8))
    turned, unexplained = align(loaded, stored)
    left_RR, _, right_RR = torch.linalg.svd(sketch(loaded, sketch_width(8)) @ stored.mT)
    free_RR = left_RR @ right_RR  # orthogonal Procrustes without a prior
    free = replace(loaded, U_OR=loaded.U_OR @ free_RR, Vh_RI=free_RR.mT @ loaded.Vh_RI)
    before, after, freely = ((s.U_OR * s.S_R) @ s.Vh_RI for s in (loaded, turned, free))
    # Derived: an entry of bfloat16's change is 4e-3 here, and 4 turns of at most 3 spreads move each of
    # the 8 x 8 pairs by at most 12 of it, 0.4% of W together; doubled, because each turn has two sides.
    assert (after - before).norm() < 0.008 * before.norm() < (freely - before).norm() / 5
    assert unexplained > 0.9


@pytest.mark.parametrize("R", [8, 96])
def test_only_what_was_found_otherwise_is_turned(R, monkeypatch):
    W_OI, small = clustered(), []
    trained = decompose(W_OI, R, solver="exact")
    stored, turn = sketch(trained, sketch_width(R)), Prior.small_turn
    monkeypatch.setattr(Prior, "small_turn", lambda *args: small.append(1) or turn(*args))
    again, unexplained = align(trained, stored)
    assert again is trained and unexplained < 1e-7
    turned, _ = align(flipped(trained), stored)
    assert not small and max(update_errors(trained, turned)) < 1e-6
    # The least that is turned: two of the directions by 1e-5 among R.
    angle = torch.tensor(1e-5 * R**0.5)
    first_O = trained.U_OR[:, 0] * angle.cos() + trained.U_OR[:, 1] * angle.sin()
    align(replace(trained, U_OR=torch.cat([first_O[:, None], trained.U_OR[:, 1:]], dim=1)), stored)
    assert small


def test_a_rotation_of_equal_values_is_found_whole():
    W_OI = with_values(40, 30, torch.tensor([2.0] * 6 + [1.0] * 24, dtype=torch.float64))
    trained = decompose(W_OI, 6, solver="exact")
    random_RR = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    loaded = replace(trained, U_OR=trained.U_OR @ random_RR, Vh_RI=random_RR.mT @ trained.Vh_RI)
    turned, unexplained = align(loaded, sketch(trained, sketch_width(6)))
    assert max(update_errors(trained, turned)) < 1e-4 and unexplained < 1e-4


def test_opposite_turns_are_found_where_values_are_zero():
    # At s = 0 the signs of u and v are not tied to each other.
    W_OI = with_values(30, 30, torch.cat([torch.linspace(1, 0.5, 27), torch.zeros(3)]).double())
    trained = decompose(W_OI, None, solver="exact")
    signs_R = torch.ones(30)
    signs_R[27:] = -1
    turned, _ = align(replace(trained, U_OR=trained.U_OR * signs_R), sketch(trained, sketch_width(30)))
    assert max(update_errors(trained, turned)) < 1e-3


def test_an_all_zero_weight_is_aligned_without_a_nan():
    trained = decompose(torch.zeros(12, 10), 4)
    turned, unexplained = align(flipped(trained), sketch(trained, sketch_width(4)))
    assert unexplained < 1e-3 and torch.isfinite(turned.U_OR).all()


def test_a_sketch_is_small_the_same_for_ever_and_leaves_the_global_state_alone():
    trained = decompose(torch.eye(3, 2) * torch.tensor([2.0, 1.0]), 2, solver="exact")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    T_RT = sketch(trained, 2, seed=0)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    # Golden: RandomState(0).standard_normal((3, 2)) and then ((2, 2)), over sqrt(4).
    golden = torch.tensor(
        [[1.76405235, 0.40015721, 0.95008842, -0.15135721], [0.97873798, 2.2408932, -0.10321885, 0.41059850]]
    )
    assert T_RT.dtype == torch.float32
    torch.testing.assert_close(T_RT.abs(), golden.abs() / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("R", "width"), [(1, 3), (8, 6), (15, 10), (16, 10), (17, 10), (384, 10)])
def test_few_directions_are_resolved_fully_and_many_by_ten_probes_a_side(R, width):
    assert sketch_width(R) == width


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.ones(3, 12), "the stored sketch is 3x12, but 4 directions"),
        (torch.ones(4, 7), "the stored sketch is 4x7, but 4 directions"),
        (torch.full((4, 8), torch.nan), "The file is damaged"),
        (torch.zeros(4, 8), "The file is damaged"),
    ],
)
def test_a_sketch_that_does_not_fit_is_refused_by_name(stored, message):
    loaded = replace(decompose(clustered(), 4), name="layers.3.q_proj")
    with pytest.raises(AdapterError) as error:
        align(loaded, stored)
    assert str(error.value).startswith("layers.3.q_proj: ") and message in str(error.value)

"""The overlap report against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from spectune.algebra import dense
from spectune.fusion.compact import compact, inner
from spectune.fusion.overlap import kept_strengths, pair_overlaps
from spectune.fusion.spectral import Spectral
from spectune.records import Delta

from .parts import lora_part, orthogonal_part, random, spectral_part


def test_the_compact_form_is_the_svd_of_the_dense_update() -> None:
    part = lora_part("a", 4, 1)
    small = compact(part.delta)
    torch.testing.assert_close(small.X_OP * small.S_P @ small.Yh_PI, dense(part.delta))
    torch.testing.assert_close(small.S_P, torch.linalg.svdvals(dense(part.delta))[:4])


def test_directions_of_roundoff_are_no_directions() -> None:
    left, right = random(9, 2, seed=1), random(2, 7, seed=2)
    doubled = Delta(torch.cat([left, left], dim=1), torch.ones(4, dtype=left.dtype), torch.cat([right, right]))
    assert len(compact(doubled).S_P) == 2
    assert len(compact(Delta(left * 0, torch.ones(2, dtype=left.dtype), right)).S_P) == 0


def test_the_figures_of_a_pair_are_those_of_the_dense_matrices() -> None:
    one, other = lora_part("a", 4, 1), lora_part("b", 3, 2)
    (pair,) = pair_overlaps([one, other])
    A, B = dense(one.delta), dense(other.delta)
    sizes = float(A.norm() * B.norm())
    assert pair.cosine == pytest.approx(float((A * B).sum()) / sizes)
    assert pair.input_cross == pytest.approx(float((A @ B.mT).norm()) / sizes)
    assert pair.output_cross == pytest.approx(float((A.mT @ B).norm()) / sizes)
    left = torch.linalg.svd(A).U[:, :4].mT @ torch.linalg.svd(B).U[:, :3]
    right = torch.linalg.svd(A).Vh[:4] @ torch.linalg.svd(B).Vh[:3].mT
    assert pair.output_angle == pytest.approx(math.degrees(math.acos(torch.linalg.svdvals(left)[0])))
    assert pair.input_angle == pytest.approx(math.degrees(math.acos(torch.linalg.svdvals(right)[0])))


def test_disjoint_rows_read_different_inputs() -> None:
    (pair,) = pair_overlaps([orthogonal_part("a", 0, 1), orthogonal_part("b", 1, 2)])
    assert pair.input_angle == pytest.approx(90, abs=1e-3) and pair.input_cross < 1e-6 < pair.output_cross


@pytest.mark.parametrize("shifts", [(False, False), (True, True), (False, True), (True, False)])
def test_mixed_terms_are_those_that_the_spectral_rule_adds(shifts: tuple[bool, bool]) -> None:
    one, other = shifts
    apart = [spectral_part("a", (0, 1), 1, shifts=one), spectral_part("b", (4, 3), 2, shifts=other)]
    shared = [spectral_part("a", (0, 1), 1, shifts=one), spectral_part("b", (1, 3), 2, shifts=other)]
    shared[1].basis.U_OR.neg_(), shared[1].basis.Vh_RI.neg_()  # another solver's signs
    shared[1].trained["A_U"].neg_(), shared[1].trained["A_Vh"].neg_()
    assert pair_overlaps(apart)[0].spectral_cross == 0 and pair_overlaps(apart)[0].shared_columns == ()
    (pair,) = pair_overlaps(shared)
    both = sum(dense(part.delta) for part in shared)
    extra = dense(Spectral(allow_overlap=True).fuse(shared, [1.0, 1.0]).delta) - both
    assert pair.shared_columns == (1,) and pair.spectral_cross == pytest.approx(float(extra.norm() / both.norm()))
    assert pair.spectral_cross > 0.01


def test_kept_strength_is_the_projection_on_the_own_update() -> None:
    parts = [lora_part("a", 4, 1), lora_part("b", 3, 2)]
    A, B = (dense(part.delta) for part in parts)
    fused = compact(
        Delta(0.5 * A + 0.25 * B, torch.ones(A.shape[1], dtype=A.dtype), torch.eye(A.shape[1], dtype=A.dtype))
    )
    shared, own = kept_strengths(parts, fused)["a"]
    assert shared / own == pytest.approx(0.5 + 0.25 * float((A * B).sum() / A.square().sum()))
    assert inner(fused, fused) == pytest.approx(fused.size**2)

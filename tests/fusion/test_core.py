"""The rules that work in the space where the updates meet, against their dense formulas."""

from __future__ import annotations

import pytest
import torch

from spectune.algebra import dense, rank, truncate
from spectune.errors import OptionError
from spectune.fusion import FUSIONS, Part
from spectune.fusion.compact import compact
from spectune.fusion.core import Cores, core_space
from spectune.fusion.table import build_fusion
from spectune.records import Delta

from .parts import COLS, DTYPE, ROWS, lora_part, orthogonal_part, random, spectral_part

WEIGHTS = [1.0, 0.7]


def two() -> list[Part]:
    return [lora_part("a", 3, 1), lora_part("b", 5, 2)]


def fused(rule: str, parts: list[Part], weights: list[float] = WEIGHTS, **options: float) -> torch.Tensor:
    return dense(build_fusion(rule, options).fuse(parts, weights).delta)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def ties(stacked: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES number by number, as its paper tells it."""
    kept = []
    for matrix in stacked:
        order = matrix.flatten().abs().argsort(descending=True)
        mask = torch.zeros(matrix.numel(), dtype=torch.bool)
        mask[order[: round(density * matrix.numel())]] = True
        kept.append(torch.where(mask.view(matrix.shape), matrix, 0))
    result = torch.zeros_like(stacked[0])
    for place in [(i, j) for i in range(result.shape[0]) for j in range(result.shape[1])]:
        numbers = [float(matrix[place]) for matrix in kept]
        agreeing = [number for number in numbers if number * sum(numbers) > 0]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def test_the_common_bases_lose_nothing() -> None:
    parts = [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)]
    space = core_space(parts)
    for core_PQ, part in zip(space.cores_NPQ, parts, strict=True):
        close(space.Q_OP @ core_PQ @ space.Qh_QI, dense(part.delta))
    close(space.Q_OP.mT @ space.Q_OP, torch.eye(space.Q_OP.shape[1], dtype=DTYPE))


def test_the_common_bases_do_not_depend_on_how_an_update_is_split() -> None:
    one, other = two()
    turn = random(3, 3, seed=9)
    split = Delta(one.delta.left_OP @ turn, 0.5 * torch.linalg.inv(turn), one.delta.right_QI)
    turned = Part("a", "layer", split)
    close(dense(turned.delta), dense(one.delta))
    close(fused("core", [turned, other]), fused("core", [one, other]))


def test_adapters_with_one_basis_meet_in_it() -> None:
    Q_OP, Q_IP = torch.linalg.qr(random(ROWS, 6))[0], torch.linalg.qr(random(COLS, 6, seed=1))[0]
    parts = [Part(name, "layer", Delta(Q_OP, random(6, 6, seed=i), Q_IP.mT)) for i, name in enumerate("abc")]
    assert core_space(parts).cores_NPQ.shape == (3, 6, 6)
    for rule in ("core", "aligned_ties", "isotropic", "calibrated"):
        assert rank(build_fusion(rule, {}).fuse(parts, [1.0] * 3).delta) <= 6


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_core_is_ties_in_the_common_bases(density: float) -> None:
    parts = two()
    space = core_space(parts)
    small = [weight * space.Q_OP.mT @ dense(p.delta) @ space.Qh_QI.mT for p, weight in zip(parts, WEIGHTS, strict=True)]
    close(fused("core", parts, density=density), space.Q_OP @ ties(small, density) @ space.Qh_QI)


def test_aligned_ties_is_ties_on_the_right_factors() -> None:
    parts = two()
    U, S, Vh = torch.linalg.svd(torch.cat([dense(part.delta) for part in parts], dim=1), full_matrices=False)
    kept = S > 1e-10
    rights = [w * V for w, V in zip(WEIGHTS, Vh[kept].split(COLS, dim=1), strict=True)]
    close(fused("aligned_ties", parts), U[:, kept] @ torch.diag(S[kept]) @ ties(rights, 0.2))


def test_isotropic_is_the_sum_with_one_singular_value() -> None:
    parts = two()
    U, S, Vh = torch.linalg.svd(sum(w * dense(p.delta) for p, w in zip(parts, WEIGHTS, strict=True)))
    kept = int((S > 1e-10).sum())
    close(fused("isotropic", parts), S[:kept].mean() * U[:, :kept] @ Vh[:kept])


def test_isotropic_keeps_directions_of_each_task() -> None:
    parts = two()
    total = sum(w * dense(p.delta) for p, w in zip(parts, WEIGHTS, strict=True))
    U, S, Vh = torch.linalg.svd(total)
    # Rank 8: 8 - 2 * 2 directions of the sum, and two of each update outside of them.
    lefts, values, rights = [U[:, :4]], [S[:4]], [Vh[:4]]
    for part, weight in zip(parts, WEIGHTS, strict=True):
        X, T, Yh = torch.linalg.svd(weight * (dense(part.delta) - U[:, :4] @ U[:, :4].mT @ dense(part.delta)))
        lefts, values, rights = [*lefts, X[:, :2]], [*values, T[:2]], [*rights, Yh[:2]]
    A, _, Bh = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    C, _, Dh = torch.linalg.svd(torch.cat(rights), full_matrices=False)
    close(fused("isotropic", parts, common=0.5), torch.cat(values).mean() * (A @ Bh) @ (C @ Dh))


def test_calibrated_is_the_dense_formula() -> None:
    parts = two()
    own = [w * dense(p.delta) for p, w in zip(parts, WEIGHTS, strict=True)]
    U, S, Vh = torch.linalg.svd(own[0] + own[1])
    wanted = torch.zeros(ROWS, COLS, dtype=DTYPE)
    for k in range(8):
        times = [max(1.0, float(S[k] * Vh[k] @ (U[:, k] @ D) / (U[:, k] @ D).square().sum())) for D in own]
        wanted += 2 / sum(times) * S[k] * torch.outer(U[:, k], Vh[k])
    close(fused("calibrated", parts), wanted)
    assert not torch.allclose(wanted, own[0] + own[1], rtol=1e-2)


def test_calibrated_adds_up_what_is_apart() -> None:
    Q_OO, Q_II = (torch.linalg.qr(random(side, side))[0] for side in (ROWS, COLS))
    parts = [
        Part(name, "layer", Delta(Q_OO[:, at], 1.0 + torch.arange(at.start, at.stop, dtype=DTYPE), Q_II[at]))
        for name, at in (("a", slice(0, 3)), ("b", slice(3, 6)))
    ]
    close(fused("calibrated", parts, [1.0, 1.0]), dense(parts[0].delta) + dense(parts[1].delta))


@pytest.mark.parametrize("rule", ["average", "task_singular", "isotropic", "calibrated"])
def test_rules_that_look_at_no_single_number_are_the_same_inside_the_common_bases(rule: str) -> None:
    parts = two()
    space: Cores = core_space(parts)
    eye_QQ = torch.eye(space.Qh_QI.shape[0], dtype=DTYPE)
    inside = [
        Part(part.adapter, "layer", Delta(core_PQ, torch.ones(len(eye_QQ), dtype=DTYPE), eye_QQ))
        for part, core_PQ in zip(parts, space.cores_NPQ, strict=True)
    ]
    close(space.Q_OP @ fused(rule, inside) @ space.Qh_QI, fused(rule, parts))


@pytest.mark.parametrize("rule", sorted(name for name, rule in FUSIONS.items() if rule.whole_weights))
def test_an_update_of_zeros_is_no_one(rule: str) -> None:
    nothing = Part("b", "layer", Delta(random(ROWS, 2), torch.zeros(2, dtype=DTYPE), random(2, COLS)))
    for parts in ([nothing], [nothing, nothing]):
        assert not fused(rule, parts, [1.0] * len(parts)).any()


@pytest.mark.parametrize(
    ("rule", "option"), [("core", "density"), ("aligned_ties", "density"), ("isotropic", "common")]
)
def test_a_share_is_above_0_and_at_most_1(rule: str, option: str) -> None:
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match=f"{option}={value} must be a share above 0 and at most 1"):
            build_fusion(rule, {option: value})


@pytest.mark.parametrize(("rows", "cols", "width"), [(12, 8, 11), (8, 12, 11), (8, 8, 11), (12, 8, 5)])
def test_an_update_wider_than_a_side_of_its_weight_is_decomposed_and_cut(rows: int, cols: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B_OP, A_PI = (torch.randn(*shape, generator=generator).double() for shape in ((rows, width), (width, cols)))
    found = compact(Delta(B_OP, torch.ones(width, dtype=torch.float64), A_PI))
    torch.testing.assert_close(found.X_OP * found.S_P @ found.Yh_PI, B_OP @ A_PI)
    left_OR, right_RI, lost = truncate(B_OP, A_PI, width)
    torch.testing.assert_close(left_OR @ right_RI, B_OP @ A_PI)
    assert lost < 1e-12

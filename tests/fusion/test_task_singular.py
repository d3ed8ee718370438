from __future__ import annotations

import pytest
import torch

from spectune.algebra import dense, rank
from spectune.fusion import Part
from spectune.fusion.task_singular import TaskSingular
from spectune.records import Delta

from .parts import COLS, DTYPE, ROWS, lora_part, random


def merged(parts: list[Part], weights: list[float]) -> torch.Tensor:
    return dense(TaskSingular().fuse(parts, weights).delta)


def polar(stacked: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(stacked, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("weights", [[1.0, 0.7], [1.0, -0.7]])
def test_it_is_the_dense_formula(weights: list[float]) -> None:
    parts = [lora_part("a", 3, 1), lora_part("b", 5, 2)]
    lefts, strengths, rights = [], [], []
    for part, weight in zip(parts, weights, strict=True):
        U, S, Vh = torch.linalg.svd(dense(part.delta), full_matrices=False)
        k = int((S > 1e-10).sum())
        lefts.append(U[:, :k])
        strengths.append(weight * S[:k])
        rights.append(Vh[:k].mT)
    wanted = polar(torch.cat(lefts, 1)) @ torch.diag(torch.cat(strengths)) @ polar(torch.cat(rights, 1)).mT
    torch.testing.assert_close(merged(parts, weights), wanted, rtol=1e-8, atol=1e-8)


def test_updates_that_are_orthogonal_already_are_added() -> None:
    Q_OO, Q_II = (torch.linalg.qr(random(side, side))[0] for side in (ROWS, COLS))
    parts = [
        Part(name, "layer", Delta(Q_OO[:, at], 1.0 + torch.arange(3, dtype=DTYPE), Q_II[at]))
        for name, at in (("a", slice(0, 3)), ("b", slice(3, 6)))
    ]
    torch.testing.assert_close(merged(parts, [1.0, 1.0]), dense(parts[0].delta) + dense(parts[1].delta))


def test_a_subtracted_update_is_stored_like_any_other() -> None:
    parts = [lora_part("a", 3, 1), lora_part("b", 5, 2)]
    found = TaskSingular().fuse(parts, [0.1, -1.0])
    S_P = found.compact.S_P
    assert bool((S_P > 0).all()) and bool((S_P[1:] <= S_P[:-1]).all())
    B_OP, A_PI, lost = found.compact.factors(5)
    missing = torch.linalg.matrix_norm(dense(found.delta) - B_OP @ A_PI) / torch.linalg.matrix_norm(dense(found.delta))
    best = torch.linalg.svdvals(dense(found.delta))
    assert lost == pytest.approx(float(missing)) == pytest.approx(float(best[5:].norm() / best.norm()))


def test_more_updates_than_dimensions_are_added_in_the_dimensions_there_are() -> None:
    lone = [Part(f"{i}", "layer", Delta(random(2, 1, seed=i), torch.ones(1, dtype=DTYPE), random(1, 2, seed=9 - i)))
            for i in range(3)]  # fmt: skip
    lefts, rights, sizes = [], [], []
    for part in lone:
        U, S, Vh = torch.linalg.svd(dense(part.delta))
        lefts.append(U[:, :1]), rights.append(Vh[:1].mT), sizes.append(S[0])
    wanted = polar(torch.cat(lefts, 1)) @ torch.diag(torch.stack(sizes)) @ polar(torch.cat(rights, 1)).mT
    found = TaskSingular().fuse(lone, [1.0] * 3)
    torch.testing.assert_close(dense(found.delta), wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.compact.S_P, torch.linalg.svdvals(wanted), rtol=1e-8, atol=1e-8)


def test_adapters_that_share_a_basis_are_cut_to_their_share_of_it() -> None:
    Q_OP, Q_IP = torch.linalg.qr(random(ROWS, 6))[0], torch.linalg.qr(random(COLS, 6, seed=1))[0]
    parts = [Part(name, "layer", Delta(Q_OP, random(6, 6, seed=i), Q_IP.mT)) for i, name in enumerate("abc")]
    found = TaskSingular().fuse(parts, [1.0, 1.0, 1.0]).delta
    assert rank(found) == 6 and found.width == (6, 6)  # 6 // 3 directions of each


@pytest.mark.parametrize("rows", [ROWS])
def test_an_update_of_zeros_takes_no_room(rows: int) -> None:
    nothing = Part("b", "layer", Delta(random(rows, 2), torch.zeros(2, dtype=DTYPE), random(2, COLS)))
    part = lora_part("a", 3, 1)
    torch.testing.assert_close(merged([part, nothing], [1.0, 1.0]), dense(part.delta), rtol=1e-8, atol=1e-8)

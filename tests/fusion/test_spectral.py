"""The union of columns: the paper's formula, exactness at weight 1, what a shared column does."""

from __future__ import annotations

import pytest
import torch

from spectune.algebra import dense
from spectune.errors import AdapterError
from spectune.fusion.spectral import Spectral, pad

from .parts import COLS, ROWS, lora_part, spectral_part, weight

PARTS = (("a", (0, 1, 2), 1), ("b", (5, 3), 2), ("c", (17, 8), 3))


def papers_formula(weights: list[float]) -> torch.Tensor:
    """(U0 + sum l_i U_i) S0 (V0 + sum l_i V_i)^T - W0, every A padded with zeros to the whole basis."""
    W_OI = weight()
    U_OK, S_K, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False)
    left_OK, right_KI = U_OK.clone(), Vh_KI.clone()
    for (name, columns, seed), strength in zip(PARTS, weights, strict=True):
        part = spectral_part(name, columns, seed)
        for own, column in enumerate(columns):
            # LAPACK's sign against ours: the numbers turn with the direction.
            sign = torch.sign(part.basis.U_OR[:, own] @ U_OK[:, column])
            left_OK[:, column] += strength * sign * part.trained["A_U"][:, own]
            right_KI[column] += strength * sign * part.trained["A_Vh"][own]
    return left_OK * S_K @ right_KI - W_OI


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [1.0] * 3, [0.2, 1.5, -0.7]])
def test_it_is_the_papers_formula(weights: list[float]) -> None:
    parts = [spectral_part(*part) for part in PARTS]
    fused = Spectral().fuse(parts, weights)
    torch.testing.assert_close(dense(fused.delta), papers_formula(weights), rtol=1e-9, atol=1e-9)


def test_weight_1_keeps_every_update_exactly_when_columns_are_disjoint() -> None:
    parts = [spectral_part(*part) for part in PARTS]
    fused = Spectral().fuse(parts, [1.0] * 3)
    together = torch.stack([dense(part.delta) for part in parts]).sum(0)
    torch.testing.assert_close(dense(fused.delta), together, rtol=1e-12, atol=1e-12)
    for part in parts:
        for own, column in enumerate(part.columns):
            place = fused.columns.index(column)
            assert torch.equal(fused.trained["A_U"][:, place], part.trained["A_U"][:, own])
            assert torch.equal(fused.basis.U_OR[:, place], part.basis.U_OR[:, own])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.5]])
def test_shifts_of_singular_values_are_fused_too_also_beside_an_adapter_without_them(weights: list[float]) -> None:
    parts = [spectral_part("a", (0, 1), 1, shifts=True), spectral_part("b", (2, 5), 2)]
    fused = Spectral().fuse(parts, weights)
    halves = [
        (part.basis.U_OR + l * part.trained["A_U"])
        @ torch.diag(part.basis.S_R + l * part.trained.get("shift", torch.zeros(2)))
        @ (part.basis.Vh_RI + l * part.trained["A_Vh"])
        - part.basis.U_OR * part.basis.S_R @ part.basis.Vh_RI
        for part, l in zip(parts, weights, strict=True)
    ]
    torch.testing.assert_close(dense(fused.delta), halves[0] + halves[1], rtol=1e-11, atol=1e-11)
    if weights[0] == 1.0:
        together = dense(parts[0].delta) + dense(parts[1].delta)
        torch.testing.assert_close(dense(fused.delta), together, rtol=1e-12, atol=1e-12)
    assert fused.trained["shift"][2:].count_nonzero() == 0 and fused.trained["shift"][:2].count_nonzero() == 2


def test_a_shift_on_a_shared_column_keeps_its_sign_when_a_basis_is_turned() -> None:
    parts = [spectral_part("a", (0, 1), 1, shifts=True), spectral_part("b", (1, 4), 2, shifts=True)]
    fused = Spectral(allow_overlap=True).fuse(parts, [1.0, 1.0])
    parts[1].basis.U_OR.neg_(), parts[1].basis.Vh_RI.neg_()
    parts[1].trained["A_U"].neg_(), parts[1].trained["A_Vh"].neg_()
    turned = Spectral(allow_overlap=True).fuse(parts, [1.0, 1.0])
    torch.testing.assert_close(dense(turned.delta), dense(fused.delta), rtol=1e-12, atol=1e-12)
    place = fused.columns.index(1)
    assert fused.trained["shift"][place] == parts[0].trained["shift"][1] + parts[1].trained["shift"][0]


def test_the_papers_1_over_n_differs_from_the_average_of_weights_in_the_last_term_only() -> None:
    parts = [spectral_part(*part) for part in PARTS]
    fused = dense(Spectral().fuse(parts, [1 / 3] * 3).delta)
    average = torch.stack([dense(part.delta) for part in parts]).mean(0)
    second = sum(p.trained["A_U"] * p.basis.S_R @ p.trained["A_Vh"] for p in parts)
    torch.testing.assert_close(average - fused, (1 / 3 - 1 / 9) * second, rtol=1e-9, atol=1e-9)
    assert (average - fused).abs().max() > 0.01


def test_the_result_is_a_spectral_a_part_over_the_union_of_columns() -> None:
    fused = Spectral().fuse([spectral_part(*part) for part in PARTS], [1.0] * 3)
    assert fused.columns == (0, 1, 2, 3, 5, 8, 17) and fused.method.name == "spectral_a" and fused.method.r == 7
    again = Spectral().fuse([fused], [1.0])
    torch.testing.assert_close(dense(again.delta), dense(fused.delta), rtol=1e-12, atol=1e-12)


def test_a_shared_column_is_refused_with_the_layer_and_the_columns() -> None:
    parts = [spectral_part("a", (0, 1, 2), 1), spectral_part("b", (2, 1, 9), 2)]
    with pytest.raises(
        AdapterError, match="layer: a and b both tuned the singular columns 1, 2, where.*--allow-overlap"
    ):
        Spectral().fuse(parts, [1.0, 1.0])


def test_numbers_add_up_on_a_shared_column_whatever_the_signs_of_the_two_bases() -> None:
    parts = [spectral_part("a", (0, 1), 1), spectral_part("b", (1, 4), 2)]
    turned = parts[1]
    turned.basis.U_OR.neg_(), turned.basis.Vh_RI.neg_()
    turned.trained["A_U"].neg_(), turned.trained["A_Vh"].neg_()
    fused = Spectral(allow_overlap=True).fuse(parts, [1.0, 1.0])
    A, B = parts[0].trained, {name: -tensor for name, tensor in turned.trained.items()}
    torch.testing.assert_close(fused.trained["A_U"][:, 1], A["A_U"][:, 1] + B["A_U"][:, 0])
    S = parts[0].basis.S_R[1]
    cross = S * (torch.outer(A["A_U"][:, 1], B["A_Vh"][0]) + torch.outer(B["A_U"][:, 0], A["A_Vh"][1]))
    both = dense(parts[0].delta) + dense(spectral_part("b", (1, 4), 2).delta)
    torch.testing.assert_close(dense(fused.delta), both + cross, rtol=1e-9, atol=1e-9)


def test_a_column_that_is_another_direction_is_not_added() -> None:
    parts = [spectral_part("a", (0, 1), 1), spectral_part("b", (1, 2), 2, weight(7))]
    with pytest.raises(AdapterError, match="layer: column 1 of b is not the same direction"):
        Spectral(allow_overlap=True).fuse(parts, [1.0, 1.0])


def test_other_methods_are_refused() -> None:
    with pytest.raises(AdapterError, match="layer: rule 'spectral' only takes spectral_a adapters, but b is a LoRA"):
        Spectral().fuse([spectral_part("a", (0, 1), 1), lora_part("b", 2, 2)], [1.0, 1.0])


def test_padding_adds_columns_and_changes_nothing() -> None:
    part = spectral_part("a", (4, 1), 1)
    wider = pad(part, (0, 1, 4, 6), weight())
    assert wider.columns == (0, 1, 4, 6) and wider.trained["A_U"].shape == (ROWS, 4)
    torch.testing.assert_close(dense(wider.delta), dense(part.delta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        wider.basis.U_OR.mT @ wider.basis.U_OR, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert wider.trained["A_Vh"].shape == (4, COLS) and not wider.trained["A_Vh"][[0, 3]].any()

"""Rules of the records' algebra, in float64 against plain matrix products."""

from __future__ import annotations

import pytest
import torch

from spectune.algebra import add, apply, dense, fix_signs, is_dense_cheaper, rank, scale, singular_values, to_factors
from spectune.records import Delta, SparseCore

O, I, P, Q, N = 7, 5, 4, 3, 6


def random_core(kind: str) -> torch.Tensor | SparseCore:
    if kind == "vector":
        return torch.randn(Q, dtype=torch.float64)
    if kind == "matrix":
        return torch.randn(P, Q, dtype=torch.float64)
    places = {"few": [1, 5], "many": [0, 1, 2, 4, 5, 7, 8, 9, 10, 11]}[kind]
    flat_C = torch.tensor(places)
    return SparseCore(flat_C // Q, flat_C % Q, torch.randn(len(places), dtype=torch.float64), (P, Q))


@pytest.fixture(params=["vector", "matrix", "few", "many"])
def delta(request: pytest.FixtureRequest) -> Delta:
    torch.manual_seed(0)
    core = random_core(request.param)
    width = Q if request.param == "vector" else P
    return Delta(torch.randn(O, width, dtype=torch.float64), core, torch.randn(Q, I, dtype=torch.float64))


def product(delta: Delta) -> torch.Tensor:
    return delta.left_OP @ delta.core_matrix() @ delta.right_QI


def test_dense_is_the_product_of_the_three_factors(delta: Delta) -> None:
    torch.testing.assert_close(dense(delta), product(delta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(N,), (2, N), ()])
def test_apply_is_a_product_with_the_dense_update(delta: Delta, batch: tuple[int, ...]) -> None:
    x_NI = torch.randn(*batch, I, dtype=torch.float64)
    torch.testing.assert_close(apply(delta, x_NI), x_NI @ product(delta).T, rtol=1e-12, atol=1e-12)


def test_factors_multiply_to_the_dense_update(delta: Delta) -> None:
    B_OP, A_PI = to_factors(delta)
    torch.testing.assert_close(B_OP @ A_PI, product(delta), rtol=1e-12, atol=1e-12)
    assert B_OP.shape[1] == A_PI.shape[0] <= min(P, Q)


def test_few_coefficients_give_a_low_lora_rank() -> None:
    core = SparseCore(torch.tensor([2]), torch.tensor([1]), torch.ones(1), (P, Q))
    B_OP, _ = to_factors(Delta(torch.randn(O, P), core, torch.randn(Q, I)))
    assert B_OP.shape[1] == 1


def test_scale_multiplies_the_update(delta: Delta) -> None:
    torch.testing.assert_close(dense(scale(delta, -0.5)), -0.5 * product(delta), rtol=1e-12, atol=1e-12)


def test_singular_values_and_rank_agree_with_a_dense_svd(delta: Delta) -> None:
    S_K = torch.linalg.svdvals(product(delta))
    found = singular_values(delta)
    torch.testing.assert_close(found, S_K[: len(found)], rtol=1e-10, atol=1e-12)
    assert rank(delta) == torch.linalg.matrix_rank(product(delta))


def test_rank_of_no_update_is_zero() -> None:
    assert rank(Delta(torch.randn(O, P), torch.zeros(P), torch.randn(P, I))) == 0


def test_gradients_reach_every_factor(delta: Delta) -> None:
    left = delta.left_OP.clone().requires_grad_()
    x_NI = torch.randn(N, I, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: apply(Delta(t, delta.core, delta.right_QI), x_NI), left)


def test_signs_are_canonical_whatever_the_solver_returned() -> None:
    U_OR, Vh_RI = torch.randn(O, 3), torch.randn(3, I)
    flips_R = torch.tensor([1.0, -1.0, -1.0])
    fixed = fix_signs(U_OR, Vh_RI)
    again = fix_signs(U_OR * flips_R, Vh_RI * flips_R[:, None])
    assert torch.equal(fixed[0], again[0]) and torch.equal(fixed[1], again[1])
    torch.testing.assert_close(fixed[0] @ fixed[1], U_OR @ Vh_RI)


def test_adding_an_update_writes_into_the_output(delta: Delta) -> None:
    rows_O, cols_I = delta.shape
    x_NI, y_NO = torch.randn(7, cols_I, dtype=torch.float64), torch.randn(7, rows_O, dtype=torch.float64)
    wanted = y_NO + apply(delta, x_NI)
    found = add(y_NO, delta, x_NI)
    assert found.data_ptr() == y_NO.data_ptr()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("fused", "training", "turn"),
    [(True, True, 43), (True, False, 32), (False, True, 128)],
)
def test_building_a_full_update_pays_from_as_many_tokens_on_as_the_docstring_says(
    fused: bool, training: bool, turn: int
) -> None:
    square = Delta(torch.eye(64), torch.ones(64), torch.eye(64))
    assert not is_dense_cheaper(square, turn - 1, fused, training)
    assert is_dense_cheaper(square, turn + 1, fused, training)


def test_a_narrow_update_is_never_built() -> None:
    narrow = Delta(torch.ones(512, 8), torch.ones(8, 8), torch.ones(8, 512))
    for tokens in (1, 100, 10_000, 10**7):
        assert not is_dense_cheaper(narrow, tokens, fused=True, training=True)
        assert not is_dense_cheaper(narrow, tokens, fused=True, training=False)

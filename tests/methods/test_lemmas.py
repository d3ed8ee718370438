"""What the papers prove, as properties of the code: Spectral Adapter 3.1 and 4.1, SVFT (a) to (c)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune import decompose
from spectune.algebra import dense, rank
from spectune.methods.spectral_a import SpectralA
from spectune.methods.spectral_r import SpectralR
from spectune.methods.svft import SVFT
from spectune.records import Spectrum

sides = st.integers(4, 12)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum_of(W_OI: torch.Tensor, R: int | None = None) -> Spectrum:
    return decompose(W_OI, R, solver="exact", dtype=torch.float64)


def matrix_rank(W_OI: torch.Tensor) -> int:
    # Absolute, since the weight may cancel to nothing; entries are of order one.
    return int(torch.linalg.matrix_rank(W_OI, atol=1e-8, rtol=0.0))


@few
@given(rows=sides, more=st.integers(0, 5), r=st.integers(1, 3), seed=seeds)
def test_lemma_3_1_rank_capacity_is_2r_while_2r_fits(rows: int, more: int, r: int, seed: int) -> None:
    """A full-row-rank O x I weight, O <= I: spectral_a reaches down to rank O - 2r, LoRA of rank r to O - r."""
    r = min(r, rows // 2)
    W_OI = random(rows, rows + more, seed=seed)
    full, method = spectrum_of(W_OI), SpectralA(r=r)
    top = spectrum_of(W_OI, r)
    # Make the tuned part equal to minus the next r components: U + A_U = -U_next S_next / S, Vh + A_Vh = Vh_next.
    scale_R = full.S_R[r : 2 * r] / full.S_R[:r]
    trained = {
        "A_U": -full.U_OR[:, r : 2 * r] * scale_R - top.U_OR,
        "A_Vh": full.Vh_RI[r : 2 * r] - top.Vh_RI,
    }
    least = matrix_rank(W_OI + dense(method.delta(top, trained, {})))
    assert (matrix_rank(W_OI), least) == (rows, rows - 2 * r)
    lora_least = matrix_rank(W_OI - full.U_OR[:, :r] @ torch.diag(full.S_R[:r]) @ full.Vh_RI[:r])
    assert lora_least == rows - r


@few
@given(rows=st.integers(6, 12), known=st.integers(2, 4), seed=seeds)
def test_spectral_a_cannot_raise_the_rank_of_a_deficient_weight(rows: int, known: int, seed: int) -> None:
    """The lemma's full-rank condition matters: LoRA can exceed rank(W), spectral_a cannot."""
    W_OI = random(rows, known, seed=seed) @ random(known, rows, seed=seed + 1)
    top = spectrum_of(W_OI, known)
    trained = {"A_U": random(rows, known, seed=seed + 2), "A_Vh": random(known, rows, seed=seed + 3)}
    assert matrix_rank(W_OI + dense(SpectralA(r=known).delta(top, trained, {}))) <= known


@few
@given(rows=sides, cols=sides, r=st.integers(1, 3), seed=seeds)
def test_spectral_a_reaches_exactly_the_weights_that_pissa_reaches(rows: int, cols: int, r: int, seed: int) -> None:
    """PiSSA trains B A in place of the top part; any such B A is (U + A_U) S (Vh + A_Vh), and back."""
    W_OI = random(rows, cols, seed=seed)
    top = spectrum_of(W_OI, r)
    B_OR, A_RI = random(rows, r, seed=seed + 1), random(r, cols, seed=seed + 2)
    pissa_OI = W_OI - top.U_OR @ torch.diag(top.S_R) @ top.Vh_RI + B_OR @ A_RI
    trained = {"A_U": B_OR / top.S_R - top.U_OR, "A_Vh": A_RI - top.Vh_RI}
    torch.testing.assert_close(W_OI + dense(SpectralA(r=r).delta(top, trained, {})), pissa_OI, rtol=1e-8, atol=1e-8)
    tuned = {"A_U": random(rows, r, seed=seed + 3), "A_Vh": random(r, cols, seed=seed + 4)}
    back_OI = W_OI + dense(SpectralA(r=r).delta(top, tuned, {}))
    principal = back_OI - (W_OI - top.U_OR @ torch.diag(top.S_R) @ top.Vh_RI)
    assert matrix_rank(principal) <= r


@few
@given(rows=sides, cols=sides, r=st.integers(2, 4), strength=st.sampled_from([0.5, 1.0, -1.0]), seed=seeds)
def test_lemma_4_1_the_rotated_weight_keeps_its_singular_values_and_has_its_svd(
    rows: int, cols: int, r: int, strength: float, seed: int
) -> None:
    W_OI = random(rows, cols, seed=seed)
    top, method = spectrum_of(W_OI, r), SpectralR(r=r)
    trained = {n: random(*s, seed=seed + i) for i, (n, s) in enumerate(method.trained_shapes(rows, cols).items())}
    frozen = method.frozen(top)
    R_U, R_V = method.rotations(trained, frozen, strength)
    for R_RR in (R_U, R_V):
        torch.testing.assert_close(R_RR.T @ R_RR, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-10)
        assert torch.linalg.det(R_RR) > 0
    tuned_OI = W_OI + dense(method.delta(top, trained, frozen, strength))
    torch.testing.assert_close(torch.linalg.svdvals(tuned_OI), torch.linalg.svdvals(W_OI), rtol=1e-9, atol=1e-9)
    # [U R_U, U2] S [V R_V, V2]^T is an SVD of the tuned weight.
    U_OR, Vh_RI = top.U_OR @ R_U, R_V.T @ top.Vh_RI
    torch.testing.assert_close(tuned_OI @ Vh_RI.T, U_OR * top.S_R, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(tuned_OI.T @ U_OR, Vh_RI.T * top.S_R, rtol=1e-8, atol=1e-8)


@few
@given(rows=sides, cols=sides, r=st.integers(2, 4), seed=seeds)
def test_a_second_adapter_stacks_on_a_rotated_one_without_another_svd(rows: int, cols: int, r: int, seed: int) -> None:
    W_OI = random(rows, cols, seed=seed)
    top, method = spectrum_of(W_OI, r), SpectralR(r=r, train_singular_values=True)
    shapes = method.trained_shapes(rows, cols).items()
    trained = {n: 0.3 * random(*s, seed=seed + i) for i, (n, s) in enumerate(shapes)}
    first = method.delta(top, trained, method.frozen(top))
    tuned_OI = W_OI + dense(first)
    stacked = top.rotated(first)
    torch.testing.assert_close(tuned_OI @ stacked.Vh_RI.T, stacked.U_OR * stacked.S_R, rtol=1e-8, atol=1e-8)
    eye_RR = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(stacked.U_OR.T @ stacked.U_OR, eye_RR, rtol=0, atol=1e-10)
    second = method.delta(stacked, trained, method.frozen(stacked))
    assert rank(second) <= r and matrix_rank(tuned_OI + dense(second)) == min(rows, cols)


def test_half_a_rotation_is_a_rotation_by_half_the_skew_matrix() -> None:
    method, top = SpectralR(r=2), spectrum_of(random(5, 5, seed=0), 2)
    angle = torch.tensor([0.4], dtype=torch.float64)
    trained = {"skew_U": angle, "skew_Vh": angle}
    R_U, _ = method.rotations(trained, method.frozen(top), 0.5)
    half, _ = method.rotations({"skew_U": angle / 2, "skew_Vh": angle / 2}, method.frozen(top))
    torch.testing.assert_close(R_U, half)
    # Cayley of a 2 x 2 skew matrix q turns by 2 atan q.
    torch.testing.assert_close(torch.atan2(half[0, 1], half[0, 0]), 2 * torch.atan(angle / 2)[0])


def test_backwards_rotation_undoes_the_forward_one() -> None:
    method, top = SpectralR(r=4), spectrum_of(random(6, 6, seed=0), 4)
    trained = {n: random(*s, seed=1) for n, s in method.trained_shapes(6, 6).items()}
    forth, back = (method.rotations(trained, method.frozen(top), s)[0] for s in (1.0, -1.0))
    torch.testing.assert_close(forth @ back, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


@few
@given(rows=sides, cols=sides, seed=seeds)
def test_svft_structure_a_diagonal_core_keeps_the_singular_vectors(rows: int, cols: int, seed: int) -> None:
    W_OI = random(rows, cols, seed=seed)
    full, K = spectrum_of(W_OI), min(rows, cols)
    M_K = 3 * random(K, seed=seed + 1)
    tuned_OI = W_OI + dense(SVFT().delta(full, {"M": M_K}, {}))
    signs_K = torch.sign(full.S_R + M_K)
    expected = (full.U_OR * (full.S_R + M_K).abs()) @ (full.Vh_RI * signs_K[:, None])
    torch.testing.assert_close(tuned_OI, expected, rtol=1e-9, atol=1e-9)


@few
@given(rows=sides, cols=sides, seed=seeds)
def test_svft_expressivity_a_dense_core_on_the_full_basis_reaches_every_matrix(rows: int, cols: int, seed: int) -> None:
    W_OI, target_OI = random(rows, cols, seed=seed), random(rows, cols, seed=seed + 1)
    thin = spectrum_of(W_OI)
    method = SVFT(pattern="banded", off_diagonals=max(rows, cols), full_basis=True)
    frozen = method.frozen(thin)
    U_OO = torch.cat([thin.U_OR, frozen["U_rest"]], dim=1)
    Vh_II = torch.cat([thin.Vh_RI, frozen["Vh_rest"]])
    torch.testing.assert_close(U_OO.T @ U_OO, torch.eye(rows, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(Vh_II @ Vh_II.T, torch.eye(cols, dtype=torch.float64), rtol=0, atol=1e-10)
    M_OI = U_OO.T @ (target_OI - W_OI) @ Vh_II.T
    trained = {"M": M_OI[frozen["rows"], frozen["cols"]]}
    assert len(trained["M"]) == rows * cols
    torch.testing.assert_close(W_OI + dense(method.delta(thin, trained, frozen)), target_OI, rtol=1e-9, atol=1e-9)


@few
@given(rows=sides, more=st.integers(1, 5), seed=seeds)
def test_the_thin_basis_misses_targets_of_a_rectangular_weight(rows: int, more: int, seed: int) -> None:
    W_OI, target_OI = random(rows, rows + more, seed=seed), random(rows, rows + more, seed=seed + 1)
    thin = spectrum_of(W_OI)
    gap_OI = target_OI - W_OI
    reached_OI = thin.U_OR @ (thin.U_OR.T @ gap_OI @ thin.Vh_RI.T) @ thin.Vh_RI
    assert torch.linalg.norm(gap_OI - reached_OI) > 1e-3


@few
@given(rows=sides, cols=sides, count=st.integers(1, 6), seed=seeds)
def test_svft_rank_is_at_most_the_number_of_coefficients(rows: int, cols: int, count: int, seed: int) -> None:
    full, method = (
        spectrum_of(random(rows, cols, seed=seed)),
        SVFT(pattern="random", off_diagonals=1, pattern_seed=seed),
    )
    frozen = method.frozen(full)
    values_C = random(len(frozen["rows"]), seed=seed + 1)
    values_C[count:] = 0
    update = dense(method.delta(full, {"M": values_C}, frozen))
    assert matrix_rank(update) <= min(count, rows, cols)


@few
@given(rows=sides, cols=sides, seed=seeds)
def test_a_truncated_basis_keeps_the_rest_of_the_weight(rows: int, cols: int, seed: int) -> None:
    """The official code drops it: there rank=2 destroys the weight. Only the update may be confined."""
    W_OI = random(rows, cols, seed=seed)
    method = SVFT(basis_rank=2)
    few_directions = spectrum_of(W_OI, 2)
    update = dense(method.delta(few_directions, {"M": random(2, seed=seed)}, {}))
    full = spectrum_of(W_OI)
    rest = full.U_OR[:, 2:].T @ (W_OI + update) @ full.Vh_RI[2:].T
    torch.testing.assert_close(rest, torch.diag(full.S_R[2:]), rtol=1e-9, atol=1e-9)

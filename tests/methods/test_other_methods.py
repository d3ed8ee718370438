"""Rules of SVDiff, SpecAdapt, LiDB and Orthogonal Adaptation that the contract does not cover."""

from __future__ import annotations

import pytest
import torch

from spectune import decompose
from spectune.algebra import dense
from spectune.errors import OptionError, WeightError
from spectune.methods import METHODS
from spectune.methods.orthogonal import LiDB, OrthogonalAdaptation, orthogonal_rows
from spectune.methods.specadapt import SpecAdapt
from spectune.methods.spectral_r import SpectralR
from spectune.methods.svdiff import SVDiff
from spectune.records import Spectrum


def no_directions(rows_O: int, cols_I: int) -> Spectrum:
    return Spectrum.unknown(rows_O, cols_I, 0, "layers.2.k")


def test_svdiff_never_lets_a_singular_value_fall_below_zero() -> None:
    W_OI = torch.randn(7, 5, dtype=torch.float64)
    full = decompose(W_OI, solver="exact", dtype=torch.float64)
    shift_K = torch.tensor([0.5, -100.0, 0.0, -0.1, 2.0], dtype=torch.float64)
    tuned = W_OI + dense(SVDiff().delta(full, {"shift": shift_K}, {}))
    expected = torch.relu(full.S_R + shift_K).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(tuned), expected, rtol=1e-9, atol=1e-9)


def test_specadapt_starts_as_the_official_code_does() -> None:
    start = SpecAdapt(r=4, basis_rank=400).start(500, 600, seed=1)
    assert torch.count_nonzero(start["A"]) == 0 and torch.equal(start["H"], torch.eye(4))
    assert start["B"].abs().max() <= 2 * 400**-0.5
    # A normal cut at two deviations has 0.8796 of its deviation.
    assert start["B"].std().item() == pytest.approx(0.8796 * 400**-0.5, rel=0.05)
    assert not torch.equal(start["B"], SpecAdapt(r=4, basis_rank=400).start(500, 600, seed=2)["B"])


def test_specadapt_counts_follow_the_formula() -> None:
    # The official code: 2 d r for each tensor, r^2 once; a ViT-B block's attention (four 768x768) takes 6144 r.
    assert 4 * SpecAdapt(r=16).trainable_count(768, 768) == 6144 * 16
    assert SpecAdapt(r=16).shared_shapes(5, 6) == {"H": (16, 16)}
    assert SpecAdapt(r=16, shared_core=False).trainable_count(768, 768) == 2 * 768 * 16 + 256


@pytest.mark.parametrize(("r", "total"), [(2, 704), (8, 11_264), (32, 180_224)])
def test_spectral_r_trains_half_of_what_the_official_code_stores(r: int, total: int) -> None:
    """Over the 176 layers of the diffusion experiment the minimal count is 704, 11,264, 180,224 with the r scales."""
    assert 176 * SpectralR(r=r, train_singular_values=True).trainable_count(768, 768) == total
    assert SpectralR(r=r).trainable_count(768, 768) == r * (r - 1)


def test_lidb_trains_150_numbers_for_each_rank() -> None:
    assert LiDB(r=1).trainable_count(768, 768) == 150
    assert 176 * LiDB(r=16).trainable_count(768, 768) == 26_400 * 16


def test_orthogonal_rows_are_orthonormal_and_do_not_depend_on_the_count() -> None:
    few, many = orthogonal_rows(3, 20, 5), orthogonal_rows(9, 20, 5)
    torch.testing.assert_close(many @ many.T, torch.eye(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(few, many[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(few, orthogonal_rows(3, 20, 6))


def test_concepts_of_orthogonal_adaptation_never_share_a_direction() -> None:
    spectrum = no_directions(6, 16)
    deltas = []
    for concept in range(4):
        method = OrthogonalAdaptation(r=3, concept=concept)
        deltas.append(dense(method.delta(spectrum, {"B": torch.randn(6, 3)}, method.frozen(spectrum))))
    for i in range(4):
        for j in range(i):
            assert (deltas[i] @ deltas[j].T).abs().max() < 1e-5
    same = OrthogonalAdaptation(r=3, concept=1).frozen(spectrum)["A"]
    assert (same @ same.T - torch.eye(3)).abs().max() < 1e-6


def test_more_concepts_than_rows_are_refused() -> None:
    with pytest.raises(WeightError, match=r"layers\.2\.k: concept 2 at r=8 needs 24 rows, .* at most 2 concepts"):
        OrthogonalAdaptation(r=8, concept=2).frozen(no_directions(6, 16))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("specadapt", {"weight_dropout": -0.1}, "weight_dropout must be at least 0 and below 1"),
        ("svdiff", {"basis_rank": 0}, "basis_rank must be an integer of at least 1"),
        ("lidb", {"output_width": 0}, "output_width must be"),
        ("orthogonal_adaptation", {"concept": -1}, "concept must be an integer of at least 0"),
    ],
)
def test_wrong_options_name_the_method(name: str, options: dict[str, int], line: str) -> None:
    with pytest.raises(OptionError, match=f"{name}: {line}"):
        METHODS[name](**options)


def test_every_method_names_its_paper_and_a_learning_rate() -> None:
    for method in METHODS.values():
        assert method.paper and 0 < method.learning_rate < 1 and method.__doc__

"""Rules of SVFT's patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectune import decompose
from spectune.algebra import dense
from spectune.errors import OptionError, WeightError
from spectune.methods.svft import SVFT
from spectune.records import Spectrum, Weight


def spectrum_of(rows_O: int, cols_I: int, K: int | None = None) -> Spectrum:
    W_OI = torch.randn(rows_O, cols_I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return decompose(Weight("layers.1.q", W_OI), K or min(rows_O, cols_I), solver="exact", dtype=torch.float64)


@pytest.mark.parametrize("d", [0, 1, 2, 5, 40])
def test_banded_places_are_exactly_the_band(d: int) -> None:
    method = SVFT(pattern="banded", off_diagonals=d)
    rows_C, cols_C = method.frozen(spectrum_of(12, 7)).values()
    expected = {(i, j) for i in range(7) for j in range(7) if abs(i - j) <= d}
    assert {(int(i), int(j)) for i, j in zip(rows_C, cols_C, strict=True)} == expected
    assert len(rows_C) == method.coefficients(12, 7) == len(expected)


def test_random_places_never_repeat_and_follow_the_seed() -> None:
    spectrum = spectrum_of(30, 30)
    places = [
        tuple(
            SVFT(pattern="random", off_diagonals=4, pattern_seed=s).frozen(spectrum)["rows"].tolist()
            + SVFT(pattern="random", off_diagonals=4, pattern_seed=s).frozen(spectrum)["cols"].tolist()
        )
        for s in (0, 0, 1)
    ]
    assert places[0] == places[1] != places[2]
    found = SVFT(pattern="random", off_diagonals=4).frozen(spectrum)
    flat = found["rows"] * 30 + found["cols"]
    assert len(flat.unique()) == len(flat) == SVFT(pattern="banded", off_diagonals=4).coefficients(30, 30)


def test_random_pattern_is_the_same_for_ever() -> None:
    """Golden places: files hold only the seed, so this drawing may never change."""
    found = SVFT(pattern="random", off_diagonals=1, pattern_seed=3).frozen(spectrum_of(4, 4))
    assert list(zip(found["rows"].tolist(), found["cols"].tolist(), strict=True)) == GOLDEN


GOLDEN = [(0, 0), (0, 3), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1)]


def test_top_k_takes_the_best_aligned_pairs_whatever_the_signs() -> None:
    spectrum = spectrum_of(10, 10)
    method = SVFT(pattern="top_k", off_diagonals=1)
    found = method.frozen(spectrum)
    scores_KK = (spectrum.U_OR.T @ spectrum.Vh_RI.T).abs()
    chosen = scores_KK[found["rows"], found["cols"]]
    least = scores_KK.flatten().sort(descending=True).values[method.coefficients(10, 10) - 1]
    assert chosen.min() >= least - 1e-12  # found by another product, so up to roundoff
    flips_R = torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0).double()
    flipped = Spectrum(spectrum.U_OR * flips_R, spectrum.S_R, spectrum.Vh_RI, spectrum.columns, spectrum.quality)
    assert torch.equal(method.frozen(flipped)["rows"], found["rows"])


def test_top_k_is_refused_for_rectangular_weights_with_the_reason() -> None:
    with pytest.raises(WeightError, match=r"layers\.1\.q: .*'top_k'.*square weight; this one is 10x6"):
        SVFT(pattern="top_k").frozen(spectrum_of(10, 6))


def test_plain_refuses_off_diagonals() -> None:
    with pytest.raises(OptionError, match="has no effect on pattern='plain'"):
        SVFT(off_diagonals=3)


def test_a_dense_core_is_the_band_that_covers_everything_bit_for_bit() -> None:
    spectrum = spectrum_of(12, 9, 5)
    band, dense = SVFT(pattern="banded", basis_rank=5, off_diagonals=4), SVFT(pattern="dense", basis_rank=5)
    M_PQ = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = band.frozen(spectrum)
    values_C = M_PQ[places["rows"], places["cols"]]
    one, other = band.delta(spectrum, {"M": values_C}, places), dense.delta(spectrum, {"M": M_PQ}, {})
    assert dense.trainable_count(12, 9) == band.trainable_count(12, 9) == 25
    assert torch.equal(one.core_matrix(), other.core_matrix())
    assert one.left_OP is other.left_OP
    assert one.right_QI is other.right_QI
    profile = band.decay_profile(spectrum, places)["M"]
    assert torch.equal(dense.decay_profile(spectrum, {})["M"][places["rows"], places["cols"]], profile)


def test_a_rectangular_core_maps_the_top_right_directions_to_the_top_left_ones() -> None:
    spectrum, method = spectrum_of(12, 9, 5), SVFT(pattern="dense", core=(3, 5))
    M_PQ = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert method.basis(12, 9) == (5, "top")
    update_OI = dense(method.delta(spectrum, {"M": M_PQ}, {}))
    torch.testing.assert_close(update_OI, spectrum.U_OR[:, :3] @ M_PQ @ spectrum.Vh_RI)
    assert SVFT(pattern="dense", core=(96, 64)).core_shape(12, 9) == (9, 9)  # no more than there are


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"core": (3, 5)}, "core=\\[3, 5\\] only goes with pattern='dense' alone; pattern='plain' has no such sizes"),
        ({"pattern": "dense", "core": (3, 5), "basis_rank": 4}, "the size is in basis_rank already"),
        ({"pattern": "dense", "core": (3, 5), "full_basis": True}, "the size is in full_basis already"),
        ({"pattern": "dense", "core": (3,)}, "must be two integers of at least 1"),
        ({"pattern": "dense", "core": (3, 0)}, "must be two integers of at least 1"),
        ({"pattern": "dense", "core": (3, True)}, "must be two integers of at least 1"),
        ({"pattern": "dense", "off_diagonals": 2}, "off_diagonals=2 has no effect on pattern='dense'"),
    ],
)
def test_sizes_of_a_core_that_cannot_be_obeyed_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        SVFT(**options)


def test_unknown_pattern_lists_the_near_miss() -> None:
    with pytest.raises(OptionError, match="Did you mean 'banded'"):
        SVFT(pattern="band")


@pytest.mark.parametrize(
    ("shape", "d", "count"), [((2048, 2048), 16, 2048 * 33 - 16 * 17), ((768, 3072), 2, 768 * 5 - 6)]
)
def test_coefficient_counts_follow_the_papers_formula(shape: tuple[int, int], d: int, count: int) -> None:
    assert SVFT(pattern="random", off_diagonals=d).trainable_count(*shape) == count
    assert SVFT().trainable_count(*shape) == min(shape)
    assert SVFT(gate=True).trainable_count(*shape) == min(shape) + 1

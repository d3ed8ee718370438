"""Rules of Spectral Adapter A."""

from __future__ import annotations

import pytest
import torch

from spectune import decompose
from spectune.algebra import dense, rank
from spectune.errors import OptionError, WeightError
from spectune.methods import build_method
from spectune.methods.spectral_a import SpectralA
from spectune.records import Weight


def test_update_is_the_papers_formula() -> None:
    W_OI = torch.randn(9, 7, dtype=torch.float64)
    spectrum = decompose(W_OI, 3, solver="exact", dtype=torch.float64)
    A_U, A_Vh = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    delta = SpectralA(r=3).delta(spectrum, {"A_U": A_U, "A_Vh": A_Vh}, {})
    S_RR = torch.diag(spectrum.S_R)
    rest_OI = W_OI - spectrum.U_OR @ S_RR @ spectrum.Vh_RI
    tuned_OI = (spectrum.U_OR + A_U) @ S_RR @ (spectrum.Vh_RI + A_Vh) + rest_OI
    torch.testing.assert_close(W_OI + dense(delta), tuned_OI, rtol=1e-11, atol=1e-11)
    assert rank(delta) == 6


def test_with_shifts_it_is_the_formula_of_the_text_to_image_code() -> None:
    """(U + A)(S + C)(V + B)^T on the tuned columns, pilancilab/spectral_adapter, SpectralLinearLayer_part."""
    W_OI = torch.randn(9, 7, dtype=torch.float64)
    spectrum = decompose(W_OI, 3, solver="exact", dtype=torch.float64)
    A_U, A_Vh = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    C_R = torch.randn(3, dtype=torch.float64)
    method = SpectralA(r=3, train_singular_values=True)
    delta = method.delta(spectrum, {"A_U": A_U, "A_Vh": A_Vh, "shift": C_R}, {})
    rest_OI = W_OI - spectrum.U_OR * spectrum.S_R @ spectrum.Vh_RI
    tuned_OI = (spectrum.U_OR + A_U) @ torch.diag(spectrum.S_R + C_R) @ (spectrum.Vh_RI + A_Vh) + rest_OI
    torch.testing.assert_close(W_OI + dense(delta), tuned_OI, rtol=1e-11, atol=1e-11)
    assert rank(delta) == method.exact_rank(9, 7) == 6
    assert method.trainable_count(9, 7) == SpectralA(r=3).trainable_count(9, 7) + 3


def test_without_shifts_nothing_of_them_is_computed() -> None:
    """The update is, bit for bit, the two products that it was before shifts could be trained."""
    spectrum = decompose(torch.randn(9, 7), 3)
    trained = {"A_U": torch.randn(9, 3), "A_Vh": torch.randn(3, 7)}
    delta = SpectralA(r=3).delta(spectrum, trained, {})
    assert list(SpectralA(r=3).trained_shapes(9, 7)) == ["A_U", "A_Vh"]
    assert torch.equal(delta.left_OP, torch.cat([trained["A_U"], spectrum.U_OR], 1))
    assert torch.equal(delta.core, torch.cat([spectrum.S_R, spectrum.S_R]))
    assert torch.equal(delta.right_QI, torch.cat([spectrum.Vh_RI + trained["A_Vh"], trained["A_Vh"]]))


# The official scripts: DeBERTaV3-base r=24 on query, key, value of 12 layers; Mistral-7B r=8 on q, k, v, o, gate of
# 32 layers; Llama-3-8B r=8 on q, k, v, up, down, gate. The paper's trainable percentages follow from these.
PUBLISHED = {
    "deberta": (24, [((768, 768), 36)], 1_327_104),
    "mistral": (8, [((4096, 4096), 64), ((1024, 4096), 64), ((14336, 4096), 32)], 11_534_336),
    "llama3": (8, [((4096, 4096), 32), ((1024, 4096), 64), ((14336, 4096), 96)], 18_874_368),
}


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(model: str) -> None:
    r, layers, total = PUBLISHED[model]
    assert sum(n * SpectralA(r=r).trainable_count(*shape) for shape, n in layers) == total


def test_directions_without_a_singular_value_are_refused() -> None:
    W_OI = torch.randn(8, 2) @ torch.randn(2, 6)
    method = SpectralA(r=4)
    spectrum = decompose(Weight("layers.0.v", W_OI), 4)
    with pytest.raises(WeightError, match=r"layers\.0\.v: .* 4 directions, but only 2 .* Lower r to 2"):
        method.check(spectrum)


def test_a_zero_weight_is_refused() -> None:
    with pytest.raises(WeightError, match="singular values .* are zero"):
        SpectralA(r=2).check(decompose(Weight("layers.0.v", torch.zeros(5, 6)), 2))


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "8"])
def test_r_must_be_a_positive_integer(r: object) -> None:
    with pytest.raises(OptionError, match="r must be an integer of at least 1"):
        SpectralA(r=r)  # type: ignore[arg-type]


def test_options_of_other_methods_are_refused_and_unknown_methods_list_near_misses() -> None:
    with pytest.raises(OptionError, match=r"'spectral_a' has no option 'pattern' .*has: r, columns"):
        build_method("spectral_a", {"pattern": "banded"})
    with pytest.raises(OptionError, match=r"unknown method 'spectral_b'. Did you mean .*'spectral_a'"):
        build_method("spectral_b", {})
